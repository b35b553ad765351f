"""Batches on a device: real pairs from a dataset, and pairs of a distilled set."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdd.data.pairs import PairDataset
from mmdd.devices import laid_out, upload
from mmdd.encoders.dual import DualEncoder
from mmdd.protocols import Protocol, text_is_tokens
from mmdd.synthetic import SyntheticPairs


@dataclass(frozen=True)
class Batch:
    """Images (m, 3, H, W) in [0, 1] and the texts that belong to them, row by row.

    texts: (m, L) token ids, (m, L, e) token embeddings or (m, d_l) vectors; mask: (m, L) or None.
    index: (m,) rows of the set the batch was taken from.
    """

    images: Tensor
    texts: Tensor
    mask: Tensor | None
    index: Tensor


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; a GPU reads it from pinned memory while the host goes on.

    On the CPU it is the array's own memory.
    """
    return upload(torch.from_numpy(np.ascontiguousarray(array)), device)


def pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """(m, H, W, 3) uint8 → (m, 3, H, W) float32 in [0, 1]; divided on the device.

    The colours of a pixel stay beside each other: on every device the result is channels-last.
    """
    return _pixels(on_device(images, device))


def _pixels(raw: Tensor) -> Tensor:
    return raw.permute(0, 3, 1, 2).to(torch.float32).div_(255)


@contextmanager
def inference(model: DualEncoder) -> Iterator[None]:
    """Without dropout and without gradients; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _tokens(texts: list[str], model: DualEncoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (T, L) on the device; columns that are padding everywhere are cut."""
    ids, mask = model.text_encoder.tokenize(texts)
    width = int(mask.sum(dim=1).max())
    return ids[:, :width].to(device), mask[:, :width].to(device)


class TextTable:
    """Every caption of a split in the form that a protocol feeds to the model, computed once.

    Under a protocol with a frozen text encoder these are the encoder's vectors; else token ids.
    `rows(images, choice)` finds the row of an image's caption.
    """

    def __init__(
        self,
        dataset: PairDataset,
        split: str,
        model: DualEncoder,
        protocol: Protocol,
        device: torch.device,
        block: int = 512,
    ) -> None:
        texts, owner = dataset.caption_table(split)
        members = dataset.indices(split)
        counts = np.bincount(owner, minlength=len(members))
        self._first = np.full(len(dataset), -1, dtype=np.int64)
        self._first[members] = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.image_of_text = owner
        self.mask: Tensor | None
        ids, mask = _tokens(texts, model, device)
        if text_is_tokens(protocol):
            self.texts, self.mask = ids, mask
            return
        with inference(model):
            parts = [
                model.text_features(ids[i : i + block], mask[i : i + block])
                for i in range(0, len(ids), block)
            ]
        self.texts, self.mask = torch.cat(parts), None

    def rows(self, images: np.ndarray, choice: np.ndarray) -> np.ndarray:
        return self._first[images] + choice


@dataclass(frozen=True)
class _Fetched:
    """Real pairs on the device or on their way there.

    raw: (m, H, W, 3) uint8; rows: (m,) of the table of texts; images: (m,) their indices. copied:
    what a stream has to wait for before it reads them, where they were copied on another one.
    """

    raw: Tensor
    rows: Tensor
    images: np.ndarray
    copied: Any = None


@dataclass(frozen=True)
class _Ahead:
    """A batch that is being fetched: how large, from which state of a generator, and by which."""

    size: int
    state: Mapping[str, Any]
    rng: np.random.Generator
    found: Future[_Fetched]


class RealBatches:
    """Batches of real pairs of one split: random draws, or seeded epochs.

    Frozen text features are computed once; images stay uint8 until they are on the device.

    prefetch: fetch the batch that `draw` is told will come next in a thread, and copy it on a
    stream of its own. None does so on a GPU alone: on a CPU, which has better things to do than to
    fetch ahead, waiting for a batch is a thousandth of an iteration (benchmarks/waiting.json).
    """

    def __init__(
        self,
        dataset: PairDataset,
        split: str,
        model: DualEncoder,
        protocol: Protocol,
        device: torch.device,
        prefetch: bool | None = None,
    ) -> None:
        self.dataset, self.split, self.device = dataset, split, device
        self.table = TextTable(dataset, split, model, protocol, device)
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cuda" if prefetch is None else prefetch:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="real-batches")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _Ahead | None = None
        self.hits = 0  # batches that had been fetched ahead

    def __len__(self) -> int:
        return len(self.dataset.indices(self.split))

    def take(self, images: np.ndarray, choice: np.ndarray) -> Batch:
        """The pairs of given images with given captions, in their order."""
        return self._batch(self._fetch(images, choice))

    def draw(
        self, size: int, rng: np.random.Generator, ahead: np.random.Generator | None = None
    ) -> Batch:
        """A random batch of at most `size` pairs without repetition.

        ahead: the generator that the next batch of this size will be drawn from. What comes out
        depends on `rng` alone, and leaves it in the same state, whether it was fetched ahead or
        not.
        """
        fetched = self._fetched_ahead(size, rng) or self._draw(size, rng)
        if ahead is not None and self._pool is not None:
            state = ahead.bit_generator.state
            self._ahead = _Ahead(size, state, ahead, self._pool.submit(self._draw, size, ahead))
        return self._batch(fetched)

    def _fetched_ahead(self, size: int, rng: np.random.Generator) -> _Fetched | None:
        """What was fetched for this very draw, if anything was."""
        ahead = self._ahead
        if ahead is None or (ahead.size, ahead.state) != (size, rng.bit_generator.state):
            return None
        self._ahead = None
        self.hits += 1
        fetched = ahead.found.result()
        rng.bit_generator.state = ahead.rng.bit_generator.state
        return fetched

    def _draw(self, size: int, rng: np.random.Generator) -> _Fetched:
        return self._fetch(*self.dataset.draw(self.split, size, rng))

    def _fetch(self, images: np.ndarray, choice: np.ndarray) -> _Fetched:
        rows = self.table.rows(images, choice)
        if self._stream is None:
            raw = on_device(self.dataset.images[images], self.device)
            return _Fetched(raw, on_device(rows, self.device), images)
        with torch.cuda.stream(self._stream):
            raw = on_device(self.dataset.images[images], self.device)
            return _Fetched(raw, on_device(rows, self.device), images, self._stream.record_event())

    def _batch(self, fetched: _Fetched) -> Batch:
        if fetched.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(fetched.copied)
            for tensor in (fetched.raw, fetched.rows):
                tensor.record_stream(current)  # or its memory could be given away too early
        mask = self.table.mask
        return Batch(
            _pixels(fetched.raw),
            self.table.texts[fetched.rows],
            None if mask is None else mask[fetched.rows],
            torch.from_numpy(fetched.images),
        )

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One pass over the split in a seeded order, one random caption per image."""
        batches = self.dataset.batches(self.split, batch_size, seed, epoch)
        if self._pool is None:
            yield from (self.take(images, choice) for images, choice in batches)
            return
        now: Future[_Fetched] | None = None
        for images, choice in batches:
            then = self._pool.submit(self._fetch, images, choice)
            if now is not None:
                yield self._batch(now.result())
            now = then
        if now is not None:
            yield self._batch(now.result())


def steps_per_epoch(pairs: int, batch_size: int) -> int:
    """Batches of an epoch; a last one of one pair is skipped, as it has nothing to be told from."""
    full, rest = divmod(pairs, batch_size)
    return full + (rest >= 2)


class SetBatches:
    """Seeded epochs over a distilled set that lies on the device as a whole."""

    def __init__(self, pairs: SyntheticPairs, device: torch.device) -> None:
        self.pairs, self.device = pairs.to(device), device

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, index: Tensor) -> Batch:
        """The pairs at `index` (k,) int64, in its order."""
        mask = self.pairs.text_mask
        return Batch(
            laid_out(self.pairs.images[index]),
            self.pairs.texts[index],
            None if mask is None else mask[index],
            index,
        )

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One pass over the set in a seeded order."""
        for rows in self.rows(batch_size, seed, epoch):
            yield self.take(rows)

    def rows(self, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """The indices of the batches of `epoch`, without their pairs."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        return torch.from_numpy(order).to(self.device).split(batch_size)


def real_pairs(
    dataset: PairDataset,
    images: np.ndarray,
    choice: np.ndarray,
    model: DualEncoder,
    protocol: Protocol,
) -> SyntheticPairs:
    """Real pairs as a set of the form a protocol wants: vectors, or token embeddings and mask.

    images: (N,) indices into the dataset; choice: (N,) caption numbers. The model gives the text
    its form and must be on the CPU or any one device; the set comes back on the CPU.
    """
    device = next(model.parameters()).device
    ids, mask = _tokens(dataset.texts_of(images, choice), model, device)
    with inference(model):
        if text_is_tokens(protocol):
            texts = model.text_encoder.embed(ids)
        else:
            texts = model.text_features(ids, mask)
    return SyntheticPairs(
        pixels(dataset.images[images], torch.device("cpu")),
        texts.float().cpu(),
        text_mask=mask.cpu() if text_is_tokens(protocol) else None,
        metadata={
            "dataset": dataset.name,
            "dataset_fingerprint": dataset.fingerprint,
            "protocol": protocol,
            "source_images": images.tolist(),
            "source_captions": choice.tolist(),
            "licence": dataset.metadata.get("licence", "that of the source dataset"),
        },
    )
