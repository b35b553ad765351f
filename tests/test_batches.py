"""Batches: rows that belong together, computed once, in a seeded order."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from mmdd.batches import Batch, RealBatches, SetBatches, TextTable, pixels, real_pairs
from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.encoders import DualEncoder, ModelConfig, build_model
from mmdd.synthetic import SyntheticPairs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build_model(ModelConfig(dim=8))


@pytest.fixture(scope="module")
def uneven() -> PairDataset:
    """Images with one to four captions, in splits that are neither sorted nor contiguous."""
    scenes = Scenes.generate({"train": 12})
    captions = [texts[: 1 + i % 4] for i, texts in enumerate(scenes.captions)]
    splits = {"train": [7, 2, 9, 4, 11, 0], "val": [1, 3], "test": [10, 5, 8]}
    return PairDataset(scenes.images, captions, splits, name="uneven")


def features(model: DualEncoder, texts: list[str]) -> torch.Tensor:
    """The text encoder's vectors, one caption at a time and without padding."""
    rows = []
    with torch.no_grad():
        for text in texts:
            ids, mask = model.text_encoder.tokenize([text])
            length = int(mask.sum())
            rows.append(model.text_features(ids[:, :length], mask[:, :length]))
    return torch.cat(rows)


def test_pixels() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    tensor = pixels(images[:, ::-1], CPU)  # a view with negative strides
    assert tensor.shape == (2, 3, 4, 5)
    assert tensor.dtype == torch.float32
    assert tensor[1, 2, 3, 4].item() == pytest.approx(images[1, 0, 4, 2] / 255)
    assert tensor.min() >= 0
    assert pixels(np.full((1, 1, 1, 3), 255, np.uint8), CPU).max().item() == 1.0


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("block", [2, 512])
def test_rows_of_the_table_are_the_captions(
    uneven: PairDataset, model: DualEncoder, split: str, block: int
) -> None:
    vectors = TextTable(uneven, split, model, "image+text_head", CPU, block=block)
    tokens = TextTable(uneven, split, model, "both", CPU)
    assert vectors.mask is None
    assert len(vectors.texts) == sum(len(uneven.captions[i]) for i in uneven.indices(split))
    for image in uneven.indices(split).tolist():
        for choice, text in enumerate(uneven.captions[image]):
            row = int(vectors.rows(np.array([image]), np.array([choice]))[0])
            torch.testing.assert_close(
                vectors.texts[row], features(model, [text])[0], rtol=1e-4, atol=1e-5
            )
            ids, mask = model.text_encoder.tokenize([text])
            assert int(tokens.rows(np.array([image]), np.array([choice]))[0]) == row
            width = tokens.texts.shape[1]
            assert torch.equal(tokens.texts[row], ids[0, :width])
            assert torch.equal(tokens.mask[row], mask[0, :width])
            assert not mask[0, width:].any()
            assert uneven.indices(split)[vectors.image_of_text[row]] == image


def test_the_table_is_as_wide_as_its_longest_caption(
    uneven: PairDataset, model: DualEncoder
) -> None:
    table = TextTable(uneven, "train", model, "both", CPU)
    longest = max(
        len(text.replace(",", " , ").split()) + 1
        for i in uneven.indices("train")
        for text in uneven.captions[i]
    )
    assert table.texts.shape[1] == longest


@pytest.mark.parametrize("protocol", ["both", "image+text_head", "heads"])
def test_images_and_texts_of_a_batch_belong_together(
    uneven: PairDataset, model: DualEncoder, protocol: str
) -> None:
    batches = RealBatches(uneven, "train", model, protocol, CPU)
    assert len(batches) == 6
    seen = []
    for batch, (images, choice) in zip(
        batches.epoch(4, seed=3, epoch=1), uneven.batches("train", 4, 3, 1), strict=True
    ):
        assert batch.index.tolist() == images.tolist()
        seen += images.tolist()
        for row, (image, number) in enumerate(zip(images, choice, strict=True)):
            assert torch.equal(
                (batch.images[row] * 255).round().byte().permute(1, 2, 0),
                torch.from_numpy(uneven.images[image].copy()),
            )
            mask = None if batch.mask is None else batch.mask[row : row + 1]
            with torch.no_grad():
                vector = model.text_features(batch.texts[row : row + 1], mask)
            expected = features(model, [uneven.captions[image][number]])
            torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)
    assert sorted(seen) == sorted(uneven.indices("train").tolist())


def test_draws_depend_on_the_generator_alone(uneven: PairDataset, model: DualEncoder) -> None:
    batches = RealBatches(uneven, "train", model, "both", CPU)
    first = batches.draw(4, np.random.default_rng(1))
    again = batches.draw(4, np.random.default_rng(1))
    assert torch.equal(first.index, again.index)
    assert torch.equal(first.texts, again.texts)
    assert len(set(first.index.tolist())) == 4
    everything = batches.draw(100, np.random.default_rng(1))
    assert sorted(everything.index.tolist()) == sorted(uneven.indices("train").tolist())


@pytest.mark.parametrize("training", [True, False])
def test_making_texts_leaves_the_mode_and_the_gradients(
    uneven: PairDataset, model: DualEncoder, training: bool
) -> None:
    own = deepcopy(model).train(training)
    table = TextTable(uneven, "train", own, "heads", CPU)
    pairs = real_pairs(uneven, np.array([7, 2]), np.array([0, 0]), own, "heads")
    assert own.training == training
    assert not table.texts.requires_grad
    assert not pairs.texts.requires_grad


@pytest.mark.parametrize("protocol", ["both", "image+text_head", "heads"])
def test_real_pairs(uneven: PairDataset, model: DualEncoder, protocol: str) -> None:
    images, choice = np.array([11, 2, 7]), np.array([3, 0, 2])
    pairs = real_pairs(uneven, images, choice, model, protocol)
    texts = [uneven.captions[i][c] for i, c in zip(images, choice, strict=True)]
    assert torch.equal(
        pairs.images, torch.from_numpy(uneven.images[images]).permute(0, 3, 1, 2) / 255
    )
    with torch.no_grad():
        vectors = model.text_features(pairs.texts, pairs.text_mask)
    torch.testing.assert_close(vectors, features(model, texts), rtol=1e-4, atol=1e-5)
    assert (pairs.texts.ndim == 3) == (protocol == "both")
    assert (pairs.text_mask is not None) == (protocol == "both")
    assert pairs.metadata["source_images"] == [11, 2, 7]
    assert pairs.metadata["source_captions"] == [3, 0, 2]
    assert pairs.metadata["dataset_fingerprint"] == uneven.fingerprint
    assert pairs.metadata["protocol"] == protocol


def test_set_batches() -> None:
    pairs = SyntheticPairs(
        torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2).clone(),
        torch.arange(5.0).view(5, 1, 1).expand(5, 4, 6).clone(),
        text_mask=torch.arange(4).expand(5, 4) < torch.tensor([1, 2, 3, 4, 4])[:, None],
    )
    batches = SetBatches(pairs, CPU)
    epochs = []
    for epoch in (0, 1, 0):
        order = []
        for batch in batches.epoch(2, seed=7, epoch=epoch):
            index = batch.index.tolist()
            order += index
            assert batch.images[:, 0, 0, 0].tolist() == index
            assert batch.texts[:, 0, 0].tolist() == index
            assert torch.equal(batch.mask, pairs.text_mask[batch.index])
        assert sorted(order) == [0, 1, 2, 3, 4]
        epochs.append(order)
    assert epochs[0] == epochs[2] != epochs[1]
    assert [len(b.index) for b in batches.epoch(2, seed=7, epoch=0)] == [2, 2, 1]
    vectors = SetBatches(SyntheticPairs(pairs.images, torch.rand(5, 6)), CPU)
    assert next(vectors.epoch(5, 0, 0)).mask is None


def test_what_was_fetched_ahead_is_the_draw_itself(uneven: PairDataset, model: DualEncoder) -> None:
    plain, ahead = (
        RealBatches(uneven, "train", model, "both", torch.device("cpu"), prefetch)
        for prefetch in (False, True)
    )

    def same(a: Batch, b: Batch) -> bool:
        return all(
            torch.equal(x, y)
            for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
            if x is not None
        )

    for step in range(3):
        rngs = [np.random.default_rng([7, step]) for _ in range(2)]
        following = np.random.default_rng([7, step + 1])
        first = plain.draw(3, rngs[0])
        second = ahead.draw(3, rngs[1], ahead=following)
        assert same(first, second)
        # A generator goes on as if it had been used, and other draws come in between.
        assert rngs[0].random() == rngs[1].random()
        assert same(plain.draw(2, rngs[0]), ahead.draw(2, rngs[1]))
    assert (plain.hits, ahead.hits) == (0, 2)
    assert same(plain.draw(2, np.random.default_rng(5)), ahead.draw(2, np.random.default_rng(5)))
    pairs = zip(plain.epoch(2, 0, 1), ahead.epoch(2, 0, 1), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_an_error_while_fetching_ahead_reaches_the_caller(
    uneven: PairDataset, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = RealBatches(uneven, "train", model, "both", torch.device("cpu"), prefetch=True)

    def fail(*arguments: object) -> None:
        raise OSError("the disk is gone")

    batches.draw(2, np.random.default_rng(0), ahead=np.random.default_rng(1))
    batches.draw(2, np.random.default_rng(1))
    monkeypatch.setattr(batches.dataset, "draw", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        batches.draw(2, np.random.default_rng(0), ahead=np.random.default_rng(1))
    monkeypatch.undo()
    batches.draw(2, np.random.default_rng(0), ahead=np.random.default_rng(1))
    batches._ahead.found.result()  # type: ignore[union-attr]
    monkeypatch.setattr(batches.dataset, "draw", fail)
    assert len(batches.draw(2, np.random.default_rng(1)).images) == 2  # it is here already
