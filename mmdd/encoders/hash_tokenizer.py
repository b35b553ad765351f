"""A tokenizer that needs no vocabulary file: every word is hashed into the vocabulary's range."""

import hashlib
import re
from dataclasses import dataclass

_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class HashTokenizer:
    """Lower-cased words and punctuation marks as stable hashes, between two special ids.

    The id of a word is SHA-256 of its UTF-8 bytes modulo the number of ordinary ids, the same in
    every process and on every machine. Two words may share an id (about 1 % of 300 words among
    30,000 ids do), and pieces of words carry no meaning: it serves text encoders with random
    weights, whose word table means nothing either, and no others.
    Book: notebooks/02_encoders_and_evaluation.
    """

    start_id: int
    end_id: int
    max_length: int
    first_word_id: int
    last_word_id: int  # inclusive

    def word_id(self, word: str) -> int:
        """The id of one lower-cased word or mark."""
        digest = hashlib.sha256(word.encode("utf-8")).digest()
        number_of_ids = self.last_word_id - self.first_word_id + 1
        return self.first_word_id + int.from_bytes(digest[:8], "big") % number_of_ids

    def __call__(self, text: str) -> list[int]:
        """Ids of one text, with start and end, cut to ``max_length`` ids and not padded."""
        words = _WORD_OR_MARK.findall(text.lower())[: self.max_length - 2]
        return [self.start_id, *(self.word_id(word) for word in words), self.end_id]
