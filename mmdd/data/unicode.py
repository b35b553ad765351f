"""Text that every encoding can hold."""


def whole_characters(text: str) -> str:
    r"""`text` with U+FFFD for each half of a surrogate pair that stands alone.

    JSON may hold such halves ("\ud83d" of an emoji that was cut in two). No encoding of text does,
    so tokenizers, file names and checksums would fail on them. Book: notebooks/01_data.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
