"""Recall against one query at a time over the full list of scores; chance against all orders."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdd import retrieval
from mmdd.errors import DataError
from mmdd.retrieval import chance_recall, recall_at_k

ROOT = Path(__file__).resolve().parents[1]
KS = (1, 5, 10)


def naive_recall(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, ks: tuple[int, ...] = KS
) -> dict[str, float]:
    """One query after the other. A rival that ties with the right answer ranks before it."""
    score = images.astype(np.float64) @ texts.astype(np.float64).T
    found: dict[str, list[bool]] = {f"{way}@{k}": [] for way in ("IR", "TR") for k in ks}
    for text, image in enumerate(owner.tolist()):
        rivals = [i for i in range(len(images)) if i != image]
        ahead = sum(score[i, text] >= score[image, text] for i in rivals)
        for k in ks:
            found[f"IR@{k}"].append(ahead < k)
    for image in range(len(images)):
        own = [t for t in range(len(texts)) if owner[t] == image]
        best = max(score[image, t] for t in own)
        ahead = sum(score[image, t] >= best for t in range(len(texts)) if owner[t] != image)
        for k in ks:
            found[f"TR@{k}"].append(ahead < k)
    result = {name: 100 * sum(hits) / len(hits) for name, hits in found.items()}
    result["mean"] = sum(result.values()) / len(result)
    return result


def draw(
    seed: int, images: int, d: int, most: int = 7, *, coarse: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit embeddings, 1 to `most` texts per image, the texts in random order.

    Coarse embeddings have entries in {-1, 0, 1}: their scores are exact, and tie often.
    """
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), rng.integers(1, most + 1, size=images))
    owner = rng.permutation(owner)
    if coarse:
        image = rng.integers(-1, 2, size=(images, d)).astype(np.float32)
        return image, rng.integers(-1, 2, size=(len(owner), d)).astype(np.float32), owner
    image = rng.normal(size=(images, d))
    text = image[owner] + 1.5 * rng.normal(size=(len(owner), d))
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (image, text)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32), owner


@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 30),
    d=st.integers(1, 9),
    most=st.integers(1, 7),
    chunk=st.integers(1, 40),
    coarse=st.booleans(),
)
@settings(deadline=None, max_examples=120)
def test_recall_equals_the_naive_count(
    seed: int, images: int, d: int, most: int, chunk: int, coarse: bool
) -> None:
    # d = 1 without coarse scores would compare roundings of the same number; ±1 are exact
    image, text, owner = draw(seed, images, d, most, coarse=coarse or d == 1)
    ours = recall_at_k(torch.tensor(image), torch.tensor(text), owner, chunk=chunk)
    assert ours == pytest.approx(naive_recall(image, text, owner), abs=1e-9)


def test_recall_of_a_larger_set_does_not_depend_on_the_chunk() -> None:
    image, text, owner = draw(1, 150, 24)
    expected = naive_recall(image, text, owner)
    assert 5 < expected["IR@1"] < 95  # neither trivial nor hopeless
    for chunk in (1, 7, 64, 150, 4096):
        ours = recall_at_k(torch.tensor(image), torch.tensor(text), owner, chunk=chunk)
        assert ours == pytest.approx(expected, abs=1e-9)


def by_definition(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray
) -> dict[tuple[str, int], int]:
    """The rank of each query's answer: all scores in float64, compared in float32."""
    with np.errstate(over="ignore", under="ignore"):
        score = (images.astype(np.float64) @ texts.astype(np.float64).T).astype(np.float32)
    found = {}
    for text, image in enumerate(owner.tolist()):
        rivals = np.delete(score[:, text], image)
        found["IR", text] = int(np.sum(rivals >= score[image, text]))
    for image in range(len(images)):
        own = owner == image
        found["TR", image] = int(np.sum(score[image, ~own] >= score[image, own].max()))
    return found


@given(
    seed=st.integers(0, 10_000),
    images=st.sampled_from([1, 2, 3, 11, 40, 90]),
    d=st.sampled_from([2, 8, 64, 300]),
    most=st.integers(1, 4),
    nearness=st.sampled_from([0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2]),
    scale=st.sampled_from([1.0, 1.0, 1e-25, 1e-12, 1e6, 1e16]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    fast=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_what_almost_ties_is_decided_in_float64(
    seed: int,
    images: int,
    d: int,
    most: int,
    nearness: float,
    scale: float,
    dtype: torch.dtype,
    fast: bool,
) -> None:
    # Every third picture is, but for `nearness`, the one before, and so is every second text of
    # a picture: coarse scores cannot tell them apart. Lengths are far from 1, some are 0.
    image, text, owner = draw(seed, images, d, most)
    rng = np.random.default_rng(seed)
    for z in (image, text):
        z[2::3] = z[1::3][: len(z[2::3])]
        z += nearness * rng.normal(size=z.shape).astype(np.float32) / math.sqrt(d)
        z *= scale * rng.choice([0.0, 0.5, 1.0, 1.0, 1.0, 1.0], size=(len(z), 1))
    z_image, z_text = torch.tensor(image).to(dtype), torch.tensor(text).to(dtype)
    expected = by_definition(z_image.double().numpy(), z_text.double().numpy(), owner)
    ks = (1, 2, 3, 5, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_multiplies_bfloat16", lambda: fast)
        ours = recall_at_k(z_image, z_text, owner, ks=ks)
    for way in ("IR", "TR"):
        ranks = np.array([rank for (name, _), rank in expected.items() if name == way])
        for k in ks:
            assert ours[f"{way}@{k}"] == pytest.approx(100 * np.mean(ranks < k), abs=1e-9)


@pytest.mark.parametrize("fast", [True, False])
def test_the_coarse_product_settles_most_queries_and_its_margin_holds(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(retrieval, "_multiplies_bfloat16", lambda: fast)
    image, text, owner = draw(7, 300, 96, 5)
    asked: list[int] = []
    near = retrieval._Tally.near

    def counted(tally: retrieval._Tally, part: torch.Tensor) -> object:
        asked.append(len(part))
        return near(tally, part)

    monkeypatch.setattr(retrieval._Tally, "near", counted)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the float32 product
        ours = recall_at_k(torch.tensor(image), torch.tensor(text), owner)
    expected = by_definition(image, text, owner)
    ranks = np.array([rank for (way, _), rank in expected.items() if way == "IR"])
    assert ours["IR@1"] == pytest.approx(100 * np.mean(ranks < 1), abs=1e-9)
    assert sum(asked) < (0.3 if fast else 0.02) * (300 + len(text))
    assert sum(asked) > 0 or not fast
    # The error of every coarse score is within the margin, and not far within it for bfloat16.
    dtype = torch.bfloat16 if fast else torch.float32
    parts = [retrieval._Rounded.of(torch.tensor(z), dtype) for z in (image, text)]
    margin = parts[0].margin(parts[1]).double()
    exact = torch.tensor(image).double() @ torch.tensor(text).double().T
    coarse = parts[0].values.double() @ parts[1].values.double().T
    error = (coarse - exact).abs().amax(dim=1)
    assert (error <= margin).all()
    assert margin.max() < (0.005 if fast else 5e-5)


def test_a_lower_float32_precision_changes_no_score() -> None:
    image, text, owner = draw(8, 120, 64, 5)
    expected = recall_at_k(torch.tensor(image), torch.tensor(text), owner)
    torch.set_float32_matmul_precision("medium")
    try:
        assert recall_at_k(torch.tensor(image), torch.tensor(text), owner) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_order_of_texts_and_images_does_not_matter() -> None:
    image, text, owner = draw(2, 40, 8)
    expected = recall_at_k(torch.tensor(image), torch.tensor(text), owner)
    rng = np.random.default_rng(0)
    texts, images = rng.permutation(len(text)), rng.permutation(len(image))
    position = np.argsort(images)  # where each image went
    moved = recall_at_k(
        torch.tensor(image[images]), torch.tensor(text[texts]), position[owner[texts]]
    )
    assert moved == pytest.approx(expected, abs=1e-9)


def test_a_small_case_by_hand() -> None:
    # Scores, image × text:     t0    t1    t2      t0 and t2 belong to image 0, t1 to image 1.
    #   image 0 = (1, 0)        0.6   0.8   0
    #   image 1 = (0, 1)        0.8   0.6   1
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    ours = recall_at_k(images, texts, [0, 1, 0], ks=(1, 2, 3))
    assert ours["IR@1"] == 0
    assert ours["IR@2"] == 100
    assert ours["TR@1"] == 0
    assert ours["TR@2"] == 50  # image 0: only t1 before its t0; image 1: t0 and t2 before its t1
    assert ours["TR@3"] == 100
    assert ours["mean"] == pytest.approx((0 + 100 + 100 + 0 + 50 + 100) / 6)


def test_keys_and_perfect_embeddings() -> None:
    eye = torch.eye(12)
    ours = recall_at_k(eye, eye.repeat_interleave(2, dim=0), np.repeat(np.arange(12), 2))
    assert list(ours) == ["IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "mean"]
    assert set(ours.values()) == {100.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_a_collapsed_model_finds_nothing(chunk: int, dtype: torch.dtype) -> None:
    # Sizes around the tiles of a matrix product, whose edges round differently in float32.
    generator = torch.Generator().manual_seed(0)
    for n, captions, d in itertools.product((2, 3, 13, 37, 129), (1, 3), (13, 64, 129, 300)):
        point = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        other = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        ours = recall_at_k(
            point.to(dtype).expand(n, d),
            other.to(dtype).expand(n * captions, d),
            np.repeat(np.arange(n), captions),
            ks=(1,),
            chunk=chunk,
        )
        assert set(ours.values()) == {0.0}


def test_duplicate_images_tie_and_the_texts_of_one_image_do_not() -> None:
    # Images 0 and 1 are the same picture: neither can be told from the other.
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ours = recall_at_k(images, images, [0, 1, 2], ks=(1, 2))
    assert ours["IR@1"] == pytest.approx(100 / 3)
    assert ours["TR@1"] == pytest.approx(100 / 3)
    assert ours["IR@2"] == ours["TR@2"] == 100
    # Two equal texts of one image are not rivals.
    twice = recall_at_k(torch.eye(3), torch.eye(3).repeat(2, 1), [0, 1, 2, 0, 1, 2], ks=(1,))
    assert twice["TR@1"] == 100


def test_owner_as_list_array_or_tensor() -> None:
    image, text, owner = draw(3, 9, 4)
    expected = recall_at_k(torch.tensor(image), torch.tensor(text), owner)
    for same in (owner.tolist(), owner.astype(np.int32), torch.tensor(owner)):
        assert recall_at_k(torch.tensor(image), torch.tensor(text), same) == expected


def test_embeddings_that_carry_a_graph() -> None:
    image = torch.eye(3, requires_grad=True)
    assert recall_at_k(image * 1, image * 2, [0, 1, 2])["mean"] == 100
    assert image.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["image", "text"])
def test_not_finite_embeddings_are_refused(side: str, value: float) -> None:
    image, text = torch.eye(4), torch.eye(4)
    (image if side == "image" else text)[2, 1] = value
    with pytest.raises(DataError, match=f"1 {side} embeddings .* row 2"):
        recall_at_k(image, text, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("image", "text", "owner", "options", "message"),
    [
        (torch.eye(3), torch.eye(4), [0, 1, 2, 2], {}, r"\(n, d\) images"),
        (torch.ones(3), torch.eye(3), [0, 1, 2], {}, r"\(n, d\) images"),
        (torch.eye(3), torch.eye(3), [0, 1], {}, "one image per text"),
        (torch.eye(3), torch.eye(3), [0.0, 1.0, 2.0], {}, "integer"),
        (torch.eye(3), torch.zeros(0, 3), [], {}, "at least"),
        (torch.eye(3), torch.eye(3), [0, 1, 3], {}, "names image 3"),
        (torch.eye(3), torch.eye(3), [0, 1, -1], {}, "negative"),
        (torch.eye(3), torch.eye(3), [0, 0, 2], {}, "no text, first at position 1"),
        (torch.eye(3), torch.eye(3), [0, 1, 2], {"chunk": 0}, "chunk"),
        (torch.eye(3), torch.eye(3), [0, 1, 2], {"ks": (0, 1)}, "K"),
        (torch.eye(3), torch.eye(3), [0, 1, 2], {"ks": ()}, "K"),
    ],
)
def test_what_does_not_fit_is_refused(
    image: torch.Tensor, text: torch.Tensor, owner: list[int], options: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        recall_at_k(image, text, owner, **options)


@pytest.mark.parametrize("owner", [[0, 1], [0, 0, 1], [0, 0, 0, 1, 2], [1, 0, 0, 1, 2, 1]])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_chance_is_the_average_over_all_orders(owner: list[int], k: int) -> None:
    ours = chance_recall(owner, ks=(k,))
    images, orders = max(owner) + 1, list(itertools.permutations(range(len(owner))))
    found = [
        any(owner[text] == image for text in order[:k])
        for order in orders
        for image in range(images)
    ]
    assert ours[f"TR@{k}"] == pytest.approx(100 * np.mean(found), abs=1e-10)
    found = [
        image in order[:k] for order in itertools.permutations(range(images)) for image in owner
    ]
    assert ours[f"IR@{k}"] == pytest.approx(100 * np.mean(found), abs=1e-10)
    assert ours["mean"] == pytest.approx((ours[f"IR@{k}"] + ours[f"TR@{k}"]) / 2)


@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=60), k=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_chance_is_hypergeometric(counts: list[int], k: int) -> None:
    texts = sum(counts)
    ours = chance_recall(np.repeat(np.arange(len(counts)), counts), ks=(k,))
    missed = [Fraction(math.comb(texts - c, k), math.comb(texts, min(k, texts))) for c in counts]
    expected = 1 - sum(missed, Fraction(0)) / len(counts) if k < texts else Fraction(1)
    assert ours[f"TR@{k}"] == pytest.approx(100 * float(expected), abs=1e-9)
    assert ours[f"IR@{k}"] == pytest.approx(100 * min(1, k / len(counts)), abs=1e-9)


def test_recall_of_random_embeddings_is_chance() -> None:
    rng = np.random.default_rng(5)
    owner = np.repeat(np.arange(30), rng.integers(1, 6, size=30))
    scores = [
        recall_at_k(
            torch.tensor(rng.normal(size=(30, 64))),
            torch.tensor(rng.normal(size=(len(owner), 64))),
            owner,
        )
        for _ in range(200)
    ]
    for name, expected in chance_recall(owner).items():
        drawn = np.array([score[name] for score in scores])
        assert abs(drawn.mean() - expected) < 4 * drawn.std() / math.sqrt(len(drawn))


LARGE = """
import resource
import numpy as np, torch
import torch.nn.functional as F
from mmdd.retrieval import recall_at_k
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = F.normalize(torch.randn(5000, 128, generator=generator), dim=1)
noise = torch.randn(25000, 128, generator=generator)
texts = F.normalize(images.repeat_interleave(5, dim=0) + 0.3 * noise, dim=1)
recall = recall_at_k(images, texts, np.repeat(np.arange(5000), 5))
print(recall["IR@1"], recall["TR@1"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_5000_images_and_25000_texts_fit_into_two_gigabytes() -> None:
    # A fresh process, because the peak of this one is anybody's; ru_maxrss counts kilobytes.
    done = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    image_recall, text_recall, kilobytes = (float(word) for word in done.stdout.split())
    assert 5 < image_recall < 99.9
    assert text_recall >= image_recall
    unit = 1024 if sys.platform == "linux" else 1
    assert kilobytes * unit < 2e9
