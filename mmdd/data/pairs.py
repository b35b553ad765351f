"""Images with their captions and splits, whatever they were read from. Knows no model."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmdd.data.unicode import whole_characters
from mmdd.errors import DataError


class PairDataset:
    """Images with captions: one uint8 array (possibly a memory map) and lists of strings.

    images: (n, H, W, 3) uint8, RGB. captions: one list of at least one string per image, with
    U+FFFD put for the halves of characters that no encoding holds.
    splits: split name → image indices, each image in at most one split.
    fingerprint: 64 hex digits naming the content; computed from images, captions and splits when
    it is not given (a reader of a large set passes the one it made while decoding).
    metadata: JSON values such as source and licence.

    Raises `DataError` when shapes, lengths or splits contradict each other.

    Book: notebooks/01_data.
    """

    def __init__(
        self,
        images: np.ndarray,
        captions: Sequence[Sequence[str]],
        splits: Mapping[str, Sequence[int] | np.ndarray],
        *,
        name: str,
        fingerprint: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"dataset {name!r}: images must be a (n, H, W, 3) uint8 array, "
                f"not {images.dtype} of shape {images.shape}."
            )
        if len(captions) != len(images):
            raise DataError(
                f"dataset {name!r}: {len(images)} images but captions for {len(captions)}."
            )
        bare = [i for i, texts in enumerate(captions) if len(texts) == 0]
        if bare:
            raise DataError(
                f"dataset {name!r}: {len(bare)} images have no caption, first at index {bare[0]}: "
                "drop them before building the dataset."
            )
        plain = [i for i, texts in enumerate(captions) if isinstance(texts, str)]
        if plain:
            raise DataError(
                f"dataset {name!r}: the captions of image {plain[0]} are one string, not a list of "
                "strings: wrap a single caption in a list."
            )
        self.images = images
        self.captions = [[whole_characters(text) for text in texts] for texts in captions]
        self.name = name
        self.splits: dict[str, np.ndarray] = {
            split: np.asarray(members, dtype=np.int64) for split, members in splits.items()
        }
        self._check_splits()
        self.metadata: dict[str, object] = dict(metadata or {})
        self.fingerprint = fingerprint or self._compute_fingerprint()

    def _check_splits(self) -> None:
        owner: dict[int, str] = {}
        for split, members in self.splits.items():
            outside = members[(members < 0) | (members >= len(self.images))]
            if len(outside):
                raise DataError(
                    f"dataset {self.name!r}: split {split!r} names image {outside[0]}, "
                    f"but there are only {len(self.images)} images."
                )
            for member in members.tolist():
                if member in owner:
                    raise DataError(
                        f"dataset {self.name!r}: image {member} is in both split "
                        f"{owner[member]!r} and split {split!r} (or twice in one)."
                    )
                owner[member] = split

    def _compute_fingerprint(self) -> str:
        digest = hashlib.sha256()
        # The lengths belong to it: moving a border between two splits changes nothing else.
        sizes = sorted((split, len(members)) for split, members in self.splits.items())
        digest.update(repr((self.images.shape, sizes)).encode())
        for start in range(0, len(self.images), 1024):
            digest.update(np.ascontiguousarray(self.images[start : start + 1024]).tobytes())
        digest.update(json.dumps(self.captions, ensure_ascii=False).encode())
        for split in sorted(self.splits):
            digest.update(self.splits[split].astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(members)}" for split, members in self.splits.items())
        height, width = self.images.shape[1:3]
        return f"PairDataset({self.name!r}, {len(self)} images of {height}×{width} px; {sizes})"

    def indices(self, split: str) -> np.ndarray:
        """Image indices of a split, (n_split,) int64. Raises `DataError` for an unknown split."""
        if split not in self.splits:
            raise DataError(
                f"dataset {self.name!r} has no split {split!r}; it has: "
                + ", ".join(map(repr, self.splits))
            )
        return self.splits[split]

    def caption_table(self, split: str) -> tuple[list[str], np.ndarray]:
        """Every caption of a split, and for each the position of its image within the split.

        Returns texts (T strings) and image_of_text (T,) int64 with values in [0, n_split):
        what `mmdd.retrieval.recall_at_k` wants. Book: notebooks/02_encoders_and_evaluation.
        """
        texts: list[str] = []
        owner: list[int] = []
        for position, image in enumerate(self.indices(split).tolist()):
            texts.extend(self.captions[image])
            owner.extend([position] * len(self.captions[image]))
        return texts, np.asarray(owner, dtype=np.int64)

    def draw(
        self, split: str, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A random batch without repetition: image indices and one caption number for each.

        Returns two (min(size, n_split),) int64 arrays. Raises `DataError` when the split is empty.
        """
        members = self.indices(split)
        if len(members) == 0:
            raise DataError(f"dataset {self.name!r}: split {split!r} is empty, nothing to draw.")
        chosen = rng.permutation(members)[:size]
        return chosen, self._choose_captions(chosen, rng)

    def batches(
        self, split: str, batch_size: int, seed: int, epoch: int = 0, drop_last: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One epoch in a seeded order: (image indices, caption numbers) per batch.

        The order depends on (seed, epoch) only, so an interrupted epoch can be replayed. Each image
        comes once with one of its captions drawn at random. Raises `DataError` for a batch size
        below one or an empty split.
        """
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}.")
        rng = np.random.default_rng([seed, epoch])
        order, choice = self.draw(split, len(self.indices(split)), rng)
        for start in range(0, len(order), batch_size):
            stop = start + batch_size
            if drop_last and stop > len(order):
                return
            yield order[start:stop], choice[start:stop]

    def texts_of(self, images: np.ndarray, choice: np.ndarray) -> list[str]:
        """The chosen caption of each image: strings in the order of `images`."""
        return [self.captions[i][c] for i, c in zip(images.tolist(), choice.tolist(), strict=True)]

    def _choose_captions(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        counts = np.array([len(self.captions[i]) for i in images.tolist()], dtype=np.int64)
        return (rng.random(len(images)) * counts).astype(np.int64)
