"""`PairDataset`: what it refuses, its fingerprint, its caption table and its batches."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdd.data.pairs import PairDataset
from mmdd.errors import DataError


def make(n: int = 10, most: int = 5, seed: int = 0, **changes: Any) -> PairDataset:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most + 1, size=n)
    cut, end = n // 2, n // 2 + n // 4
    arguments: dict[str, Any] = {
        "images": rng.integers(0, 256, size=(n, 4, 6, 3), dtype=np.uint8),
        "captions": [[f"image {i} text {c}" for c in range(counts[i])] for i in range(n)],
        "splits": {"train": range(cut), "val": range(cut, end), "test": range(end, n)},
        "name": "made up",
    }
    return PairDataset(**(arguments | changes))


def test_what_it_holds() -> None:
    dataset = make(8, metadata={"licence": "MIT"})
    assert len(dataset) == 8
    assert dataset.images.shape == (8, 4, 6, 3)
    assert list(dataset.splits) == ["train", "val", "test"]
    assert dataset.indices("test").tolist() == [6, 7]
    assert dataset.indices("test").dtype == np.int64
    assert dataset.metadata == {"licence": "MIT"}
    assert repr(dataset) == "PairDataset('made up', 8 images of 4×6 px; train 4, val 2, test 2)"


def test_a_memory_map_is_not_read_into_memory(tmp_path: Path) -> None:
    plain = make()
    np.save(tmp_path / "images.npy", plain.images)
    mapped = make(images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    assert isinstance(mapped.images, np.memmap)
    assert mapped.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((10, 4, 4), np.uint8)}, "uint8 array"),
        ({"images": np.zeros((10, 3, 4, 4), np.uint8)}, "uint8 array"),
        ({"images": np.zeros((10, 4, 4, 3), np.float32)}, "not float32"),
        ({"captions": [["a"]] * 9}, "10 images but captions for 9"),
        ({"captions": [["a"]] * 7 + [[]] + [["b"]] + [[]]}, "2 images .* first at index 7"),
        ({"captions": [["a"]] * 4 + ["a dog"] * 6}, "image 4 are one string"),
        ({"splits": {"train": [0, 10]}}, "'train' names image 10, .* only 10"),
        ({"splits": {"val": [-1]}}, "'val' names image -1"),
        ({"splits": {"train": [0, 3], "val": [3]}}, "image 3 is in both .*'train'.*'val'"),
        ({"splits": {"train": [2, 2]}}, "twice"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "use",
    [
        lambda dataset: dataset.indices("trian"),
        lambda dataset: dataset.caption_table("trian"),
        lambda dataset: dataset.draw("trian", 2, np.random.default_rng(0)),
        lambda dataset: list(dataset.batches("trian", 2, seed=0)),
    ],
)
def test_an_unknown_split_names_the_known_ones(use: Callable[[PairDataset], Any]) -> None:
    with pytest.raises(DataError, match="no split 'trian'; it has: 'train', 'val', 'test'"):
        use(make())


# ---- fingerprint -------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content() -> None:
    base = make()
    assert len(base.fingerprint) == 64
    assert make().fingerprint == base.fingerprint
    assert make(name="other", metadata={"a": 1}).fingerprint == base.fingerprint
    order = {split: base.splits[split] for split in ("test", "train", "val")}
    assert make(splits=order).fingerprint == base.fingerprint
    assert make(fingerprint="f" * 64).fingerprint == "f" * 64


def test_the_fingerprint_sees_every_change() -> None:
    base = make()
    pixel = base.images.copy()
    pixel[9, 3, 5, 2] ^= 1
    word = [list(texts) for texts in base.captions]
    word[9][0] += "."
    merged = [["a", "b"]] * 10, [["a b"]] * 10, [["a", "b"]] * 9 + [["b", "a"]]
    splits = base.splits
    variants = [
        make(images=pixel),
        make(images=base.images.reshape(10, 6, 4, 3)),
        make(captions=word),
        *(make(captions=captions) for captions in merged),
        make(splits={"train": range(5), "val": range(5, 7), "tset": range(7, 10)}),
        # the border between two splits that lie side by side
        make(splits={"train": range(4), "val": range(4, 7), "test": range(7, 10)}),
        make(splits={**splits, "train": splits["train"][::-1]}),
        make(splits={"train": splits["val"], "val": splits["train"], "test": splits["test"]}),
        make(splits={**splits, "empty": []}),
    ]
    fingerprints = [dataset.fingerprint for dataset in (base, *variants)]
    assert len(set(fingerprints)) == len(fingerprints)


# ---- captions and batches ----------------------------------------------------------------------


def test_the_caption_table_lists_every_caption_with_its_image() -> None:
    dataset = make(12)
    for split in dataset.splits:
        texts, owner = dataset.caption_table(split)
        members = dataset.indices(split)
        expected = [(text, i) for i in members.tolist() for text in dataset.captions[i]]
        assert [(t, members[o]) for t, o in zip(texts, owner, strict=True)] == expected
        assert owner.dtype == np.int64
    empty = make(splits={"train": []})
    texts, owner = empty.caption_table("train")
    assert texts == []
    assert owner.shape == (0,)


@given(
    n=st.integers(4, 30),
    size=st.integers(1, 35),
    seed=st.integers(0, 999),
    epoch=st.integers(0, 50),
    drop_last=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_brings_each_image_once(
    n: int, size: int, seed: int, epoch: int, drop_last: bool
) -> None:
    dataset = make(n, seed=seed)
    members = dataset.indices("train").tolist()
    batches = list(dataset.batches("train", size, seed, epoch, drop_last))
    sizes = [len(images) for images, _ in batches]
    full, rest = divmod(len(members), size)
    assert sizes == [size] * full + ([rest] if rest and not drop_last else [])
    seen = [i for images, _ in batches for i in images.tolist()]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(members)
    if not drop_last:
        assert sorted(seen) == sorted(members)
    for images, choice in batches:
        assert images.dtype == choice.dtype == np.int64
        for i, c, text in zip(
            images.tolist(), choice.tolist(), dataset.texts_of(images, choice), strict=True
        ):
            assert text == dataset.captions[i][c] == f"image {i} text {c}"
    again = list(dataset.batches("train", size, seed, epoch, drop_last))
    for (i, c), (j, d) in zip(batches, again, strict=True):
        np.testing.assert_array_equal(i, j)
        np.testing.assert_array_equal(c, d)


def test_dropping_the_last_batch_changes_no_other() -> None:
    dataset = make(40)
    kept = list(dataset.batches("train", 7, seed=3))
    dropped = list(dataset.batches("train", 7, seed=3, drop_last=True))
    assert len(kept) == len(dropped) + 1
    for (i, c), (j, d) in zip(dropped, kept, strict=False):
        np.testing.assert_array_equal(i, j)
        np.testing.assert_array_equal(c, d)


def test_seed_and_epoch_change_order_and_captions() -> None:
    dataset = make(200)

    def epoch(seed: int, number: int) -> tuple[list[int], dict[int, int]]:
        ((images, choice),) = dataset.batches("train", 100, seed, number)
        return images.tolist(), dict(zip(images.tolist(), choice.tolist(), strict=True))

    runs = [epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1)]
    for i, (order, captions) in enumerate(runs):
        for other_order, other_captions in runs[:i]:
            assert order != other_order
            assert captions != other_captions


def test_captions_and_positions_are_drawn_evenly() -> None:
    dataset = make(8, splits={"train": range(8)}, captions=[["a", "b", "c"]] * 8)
    drawn, first = Counter[int](), Counter[int]()
    for epoch in range(3000):
        ((images, choice),) = dataset.batches("train", 8, seed=1, epoch=epoch)
        drawn.update(choice.tolist())
        first[int(images[0])] += 1
    # four standard deviations of a binomial
    assert set(drawn) == {0, 1, 2}
    assert all(abs(count - 8000) < 4 * (24000 * 2 / 9) ** 0.5 for count in drawn.values())
    assert len(first) == 8
    assert all(abs(count - 375) < 4 * (3000 * 7 / 64) ** 0.5 for count in first.values())


def test_draw_takes_no_image_twice_and_no_more_than_there_are() -> None:
    dataset = make(20)
    images, choice = dataset.draw("train", 6, np.random.default_rng(0))
    assert len(set(images.tolist())) == len(choice) == 6
    everything, _ = dataset.draw("train", 1000, np.random.default_rng(0))
    assert sorted(everything.tolist()) == dataset.indices("train").tolist()
    repeated, _ = dataset.draw("train", 6, np.random.default_rng(0))
    np.testing.assert_array_equal(images, repeated)


def test_empty_splits_and_batches_are_refused() -> None:
    dataset = make(splits={"train": range(10), "val": []})
    with pytest.raises(DataError, match="'val' is empty"):
        dataset.draw("val", 2, np.random.default_rng(0))
    with pytest.raises(DataError, match="'val' is empty"):
        list(dataset.batches("val", 2, seed=0))
    for size in (0, -3):
        with pytest.raises(DataError, match="batch_size must be at least 1"):
            list(dataset.batches("train", size, seed=0))
