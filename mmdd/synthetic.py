"""`SyntheticPairs`, the one artefact that every method starts from and returns."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdd.errors import ArtefactError, ConfigError
from mmdd.files import load_tensors, save_checked, verify
from mmdd.similarity import (
    FullSimilarity,
    IdentitySimilarity,
    LowRankSimilarity,
    Similarity,
)

_Content = tuple[dict[str, Tensor], dict[str, Any]]
FORMAT = "mmdd.SyntheticPairs"
VERSION = 1
# By version: what makes a file's tensors and header those of the next version. Files of an older
# version stay readable: who raises VERSION adds the step from the one before.
_MIGRATIONS: dict[int, Callable[[_Content], _Content]] = {}
_SIMILARITIES = {cls.kind: cls for cls in (IdentitySimilarity, FullSimilarity, LowRankSimilarity)}
# What a file with a valid checksum but foreign content can make the constructors raise.
_UNUSABLE = (AttributeError, ConfigError, LookupError, RuntimeError, TypeError, ValueError)


class SyntheticPairs:
    """N image–text pairs, distilled or real, ready to train a student on.

    images: (N, 3, H, W) float32 pixels; 0 is black and 1 is white, and a distilled image may go
    beyond. texts: (N, d_l) float32 feature vectors of a frozen text encoder, or (N, L, d) float32
    token embeddings that enter a text encoder past its embedding table; text_mask: (N, L) bool,
    true where a token counts (token embeddings only; None counts all). similarity: a module of
    `mmdd.similarity`, or None for the identity. learning_rates: student learning rates learned
    with the set, by branch ("image", "text") or part of the model ("text_head"). metadata: JSON
    values: provenance and licence.

    Raises `ConfigError` where shapes contradict each other.

    Book: notebooks/00_start.
    """

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        *,
        text_mask: Tensor | None = None,
        similarity: Similarity | None = None,
        learning_rates: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.images, self.texts, self.text_mask = images, texts, text_mask
        self.similarity = similarity
        self.learning_rates = dict(learning_rates or {})
        self.metadata = dict(metadata or {})
        self._check()

    def _check(self) -> None:
        images, texts, mask = self.images, self.texts, self.text_mask
        if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
            raise ConfigError(f"images must be (N, 3, H, W), N ≥ 1; got {tuple(images.shape)}.")
        if texts.ndim not in (2, 3) or len(texts) != len(images):
            raise ConfigError(
                f"texts must be ({len(images)}, d) or ({len(images)}, L, d); "
                f"got {tuple(texts.shape)}."
            )
        if images.dtype != torch.float32 or texts.dtype != torch.float32:
            raise ConfigError(
                f"images and texts must be float32, not {images.dtype}, {texts.dtype}."
            )
        if mask is not None and (texts.ndim != 3 or mask.shape != texts.shape[:2]):
            raise ConfigError(
                f"text_mask of shape {tuple(mask.shape)} does not fit texts {tuple(texts.shape)}."
            )
        if self.similarity is not None and self.similarity.n != len(images):
            raise ConfigError(
                f"similarity is for {self.similarity.n} pairs, the set has {len(images)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        kind = "vectors" if self.texts.ndim == 2 else "token embeddings"
        return (
            f"SyntheticPairs({len(self)} pairs; images {tuple(self.images.shape[1:])}, "
            f"text {kind} {tuple(self.texts.shape[1:])}, {self.num_bytes() / 1e3:.0f} kB)"
        )

    def num_bytes(self) -> int:
        """Bytes that the set itself takes: images, texts, mask, similarity, learning rates.

        Learned tensors count at their stored size (float32), a mask at one byte per token, a
        learning rate at four bytes; metadata does not count. Book: notebooks/14_efficiency.
        """
        stored = sum(t.numel() * t.element_size() for t in self._tensors().values())
        return stored + 4 * len(self.learning_rates)

    def to(self, device: torch.device | str) -> "SyntheticPairs":
        """The same set with its tensors on another device; this one stays where it is."""
        return SyntheticPairs(
            self.images.to(device),
            self.texts.to(device),
            text_mask=None if self.text_mask is None else self.text_mask.to(device),
            similarity=(
                None if self.similarity is None else copy.deepcopy(self.similarity).to(device)
            ),
            learning_rates=self.learning_rates,
            metadata=self.metadata,
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"images": self.images, "texts": self.texts}
        if self.text_mask is not None:
            tensors["text_mask"] = self.text_mask
        if self.similarity is not None:
            for name, value in self.similarity.state_dict().items():
                tensors[f"similarity.{name}"] = value
        return tensors

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, atomically, with a checksum of tensors and header.

        Book: notebooks/00_start.
        """
        tensors = self._tensors()
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "learning_rates": self.learning_rates,
            "metadata": self.metadata,
        }
        if self.similarity is not None:
            header["similarity"] = {"kind": self.similarity.kind, "n": self.similarity.n}
            if isinstance(self.similarity, LowRankSimilarity):
                header["similarity"] |= {
                    "rank": self.similarity.rank,
                    "alpha": self.similarity.alpha,
                }
        save_checked(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "SyntheticPairs":
        """Read a file that `save` wrote. Never executes anything from the file.

        A file of an older version is brought to this one in memory, after its checksum was found
        right. Raises `ArtefactError` for a damaged file, another kind of file, or a newer format.
        """
        return cls.load_with_header(path)[0]

    @classmethod
    def load_with_header(cls, path: str | Path) -> tuple["SyntheticPairs", dict[str, Any]]:
        """`load`, and beside the set the header as it stands in the file."""
        tensors, header = load_tensors(Path(path))
        as_stored = header
        if header.get("format") != FORMAT:
            raise ArtefactError(f"{path} holds {header.get('format')!r}, not a distilled set.")
        version = header.get("version")
        if version != VERSION and version not in list(_MIGRATIONS):  # it may be of any type
            raise ArtefactError(
                f"{path} has format version {version!r}; this mmdd reads version "
                f"{VERSION}: install the mmdd that wrote it, or a newer one."
            )
        verify(Path(path), tensors, header)
        while version != VERSION:
            tensors, header = _MIGRATIONS[version]((tensors, header))
            version = header["version"]
        try:
            for name, rate in header["learning_rates"].items():
                _require_number(f"learning rate {name!r}", rate)
            pairs = cls(
                tensors["images"],
                tensors["texts"],
                text_mask=tensors.get("text_mask"),
                similarity=_load_similarity(tensors, header.get("similarity")),
                learning_rates=header["learning_rates"],
                metadata=header["metadata"],
            )
        except _UNUSABLE as error:
            raise ArtefactError(f"{path} is not a usable distilled set: {error}") from error
        return pairs, as_stored


def _require_number(name: str, value: Any) -> None:
    """JSON also holds NaN, and integers that no float can hold."""
    if not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ConfigError(f"{name} is no usable number")


def _load_similarity(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any] | None
) -> Similarity | None:
    if description is None:
        return None
    arguments = {name: value for name, value in description.items() if name != "kind"}
    # Before memory is taken for them: a file of some bytes may claim a billion pairs.
    if arguments.get("n") != len(tensors["images"]):
        raise ConfigError(f"similarity for {arguments.get('n')!r} pairs")
    if "rank" in arguments and arguments["rank"] != tensors["similarity.left"].shape[-1]:
        raise ConfigError(f"similarity of rank {arguments['rank']!r}, but with other factors")
    _require_number("alpha", arguments.get("alpha", 0.0))
    module = _SIMILARITIES[description["kind"]](**arguments)
    prefix = "similarity."
    module.load_state_dict(
        {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    )
    return module
