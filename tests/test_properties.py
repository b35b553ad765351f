"""Properties that hold for any input: configurations, records, losses, similarities, readers."""

import csv
import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mmdd import losses
from mmdd.config import RunConfig
from mmdd.data.readers import read_coco_captions, read_flickr8k, read_karpathy, seeded_split
from mmdd.data.unicode import whole_characters
from mmdd.distill import METHODS
from mmdd.retrieval import recall_at_k
from mmdd.selection import SELECTORS
from mmdd.similarity import FullSimilarity, IdentitySimilarity, LowRankSimilarity
from mmdd.store import ResultsStore

pytestmark = pytest.mark.filterwarnings("error")
FILES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
QUICK = settings(max_examples=40, deadline=None)

# -- configurations --------------------------------------------------------------------------------

NUMBERS = st.floats(1e-6, 1e3, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid configurations as JSON values, of any method, with few or many keys given."""
    method = draw(st.sampled_from([*METHODS, *SELECTORS, "full"]))
    given: dict[str, Any] = {
        "pairs": st.integers(2, 500),
        "seed": st.integers(0, 2**40),
        "init": st.sampled_from([*SELECTORS, "noise"]),
        "protocol": st.sampled_from(["heads", "image+text_head"]),
        "sweep": st.text(string.ascii_letters + string.digits, min_size=1, max_size=9),
        "dataset": st.fixed_dictionaries(
            {}, optional={"size": st.integers(8, 300), "train": st.integers(500, 9_999)}
        ),
        "evaluation": st.fixed_dictionaries(
            {},
            optional={"students": st.integers(1, 9), "lr_heads": NUMBERS, "temperature": NUMBERS},
        ),
        "runtime": st.fixed_dictionaries({}, optional={"threads": st.integers(1, 64)}),
    }
    values = draw(st.fixed_dictionaries({"protocol": given.pop("protocol")}, optional=given))
    if method in METHODS and draw(st.booleans()):
        values["settings"] = {"iterations": draw(st.integers(1, 9_999))}
    return values | {"method": method}


@QUICK
@given(values=configs())
def test_a_config_survives_the_round_trip(values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    for again in (
        RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))),
        RunConfig.model_validate_json(config.model_dump_json()),
        RunConfig.model_validate(config.identity()),
    ):
        assert again.run_id == config.run_id
        assert again.set_id == config.set_id
        assert again.identity() == config.identity()


@QUICK
@given(values=configs(), data=st.data())
def test_a_run_id_knows_what_counts(values: dict[str, Any], data: st.DataObject) -> None:
    config = RunConfig.model_validate(values)
    order = data.draw(st.permutations(list(values)))
    shuffled = RunConfig.model_validate({key: values[key] for key in order})
    assert shuffled.run_id == config.run_id, "the order of keys does not count"
    elsewhere = values | {"sweep": "elsewhere", "runtime": {"device": "cpu", "threads": 3}}
    assert RunConfig.model_validate(elsewhere).run_id == config.run_id
    other = RunConfig.model_validate(values | {"seed": config.seed + 1})
    assert other.run_id != config.run_id
    assert other.set_id != config.set_id
    scored = values | {"evaluation": values.get("evaluation", {}) | {"epochs": 7}}
    assert RunConfig.model_validate(scored).run_id != config.run_id
    assert RunConfig.model_validate(scored).set_id == config.set_id


# -- records ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=8,
)
RECORDS = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "run_id": st.sampled_from([f"{i:016x}" for i in range(4)]),
        "sweep": st.sampled_from(["one", "two"]),
        "finished": st.integers(0, 9).map(str),
    },
    optional={"scores": JSON, "note": JSON},
)


@FILES
@given(records=st.lists(RECORDS, min_size=1, max_size=6), pack=st.booleans())
def test_a_store_returns_the_latest_of_what_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], pack: bool
) -> None:
    store = ResultsStore(tmp_path_factory.mktemp("results"))
    written: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        store.write(record)
        written[record["sweep"], record["run_id"]] = record
    if pack:
        for sweep in {sweep for sweep, _ in written}:
            store.pack(sweep)
    found = {record["run_id"]: record for record in store.records()}
    assert set(found) == {run_id for _, run_id in written}
    for run_id, record in found.items():
        copies = [r for (_, name), r in written.items() if name == run_id]
        assert record in copies, "to the last character and bit"
        assert record["finished"] == max(r["finished"] for r in copies)
        assert store.find(run_id) in copies


# -- losses ----------------------------------------------------------------------------------------


def features(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


SIMILARITY_LOSSES = {
    "ence": losses.extended_info_nce,
    "bce": losses.binary_cross_entropy,
    "wbce": losses.weighted_binary_cross_entropy,
}
SIZES = {"m": st.integers(2, 6), "d": st.integers(2, 5), "seed": st.integers(0, 9_999)}


@QUICK
@given(**SIZES)
def test_contrastive_losses_are_symmetric_and_blind_to_order_and_rotation(
    m: int, d: int, seed: int
) -> None:
    z, w = features(seed, m, d), features(seed + 1, m, d)
    target = torch.rand(m, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator()))[0]
    expected = losses.info_nce(z, w)
    for other in (losses.info_nce(w, z), losses.info_nce(z[order], w[order])):
        torch.testing.assert_close(other, expected)
    torch.testing.assert_close(losses.info_nce(z @ turn, w @ turn), expected)
    logits = z @ w.T / 0.07
    for name, loss in SIMILARITY_LOSSES.items():
        value = loss(logits, target)
        assert value >= 0, name
        torch.testing.assert_close(loss(logits.T, target.T), value, msg=name)
        moved = loss(logits[order][:, order], target[order][:, order])
        torch.testing.assert_close(moved, value, msg=name)


@QUICK
@given(**SIZES)
def test_matching_losses_are_blind_to_order_and_translation(m: int, d: int, seed: int) -> None:
    real, syn = (
        (features(seed + i, m + i, d) for i in (0, 1)),
        (features(seed + i, m, d) for i in (2, 3)),
    )
    a, _ = real
    b = features(seed + 5, m, d)
    x, y = syn
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    value = losses.covmatch(a, b, x, y, 2.0, 0.3)
    assert value >= 0
    torch.testing.assert_close(
        losses.covmatch(a[order], b[order], x[order], y[order], 2.0, 0.3), value
    )
    torch.testing.assert_close(
        losses.cross_covariance(a + 3.0, b - 2.0), losses.cross_covariance(a, b)
    )
    torch.testing.assert_close(losses.cross_covariance(b, a), losses.cross_covariance(a, b).T)
    energy = losses.geodesic_kernel_energy(a, x)
    torch.testing.assert_close(losses.geodesic_kernel_energy(x, a), energy)
    torch.testing.assert_close(losses.geodesic_kernel_energy(a[order], x), energy)


DIFFERENTIABLE: dict[str, Callable[[int, int, int], tuple[Callable[..., Tensor], list[Tensor]]]] = {
    "info_nce": lambda m, d, s: (
        lambda z, w: losses.info_nce(z, w, 0.5),
        [features(s, m, d), features(s + 1, m, d)],
    ),
    **{
        name: (
            lambda m, d, s, loss=loss: (
                loss,
                [2 * features(s, m, m), (features(s + 1, m, m).abs() * 0.4 + 0.05)],
            )
        )
        for name, loss in SIMILARITY_LOSSES.items()
    },
    "covmatch": lambda m, d, s: (
        lambda a, b, x, y: losses.covmatch(a, b, x, y, 2.0, 0.3),
        [features(s + i, m, d) for i in range(4)],
    ),
    "linear_contrastive": lambda m, d, s: (
        lambda h, k, g, j: losses.linear_contrastive(h, k, g, j, 1.5),
        [features(s, m, d), features(s + 1, m, d), features(s + 2, 2, d), features(s + 3, 2, d)],
    ),
    "trajectory_distance": lambda m, d, s: (
        losses.trajectory_distance,
        [features(s + i, m * d) for i in range(3)],
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@settings(max_examples=6, deadline=None)
@given(m=st.integers(2, 4), d=st.integers(2, 4), seed=st.integers(0, 9_999))
def test_gradients_against_differences(name: str, m: int, d: int, seed: int) -> None:
    function, inputs = DIFFERENTIABLE[name](m, d, seed)
    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs))


@QUICK
@given(**SIZES, zeros=st.integers(1, 6))
def test_features_of_no_length_keep_losses_and_gradients_finite(
    m: int, d: int, seed: int, zeros: int
) -> None:
    raw = [torch.randn(m, d, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)]
    for x in raw:
        x[:zeros] = 0
        x.requires_grad_()
    z, w = (F.normalize(x, dim=1) for x in raw)
    target = torch.eye(m)
    values = {name: loss(z @ w.T / 0.07, target) for name, loss in SIMILARITY_LOSSES.items()}
    values |= {
        "info_nce": losses.info_nce(z, w),
        "covmatch": losses.covmatch(z, w, w, z, 2.0, 0.1),
        "agreement": losses.agreement(z, w).sum(),
        "discrepancy": losses.discrepancy(z, z.detach().clone()).sum(),
        "energy": losses.geodesic_kernel_energy(losses.agreement(z, w), losses.agreement(w, z)),
    }
    for name, value in values.items():
        assert torch.isfinite(value), name
        used = torch.autograd.grad(value, raw, retain_graph=True, allow_unused=True)
        assert all(torch.isfinite(g).all() for g in used if g is not None), name


# -- similarities ----------------------------------------------------------------------------------


@QUICK
@given(data=st.data(), n=st.integers(1, 8), rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_similarity_of_a_batch_is_a_piece_of_the_whole(
    data: st.DataObject, n: int, rank: int, seed: int
) -> None:
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=6)), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for module in (IdentitySimilarity(n), FullSimilarity(n), LowRankSimilarity(n, rank, 2.0)):
        torch.testing.assert_close(module.matrix(), torch.eye(n))
        with torch.no_grad():
            for p in module.parameters():
                p += torch.randn(p.shape, generator=generator)
        whole = module.matrix()
        torch.testing.assert_close(module.matrix(index), whole[index][:, index])
        if isinstance(module, LowRankSimilarity):
            residual = (whole - torch.diag(module.omega)).detach()
            assert torch.linalg.matrix_rank(residual, rtol=1e-4) <= rank


# -- recall ----------------------------------------------------------------------------------------


@QUICK
@given(data=st.data(), n=st.integers(1, 7), d=st.integers(1, 4), seed=st.integers(0, 9_999))
def test_recall_is_blind_to_scale_rotation_and_order(
    data: st.DataObject, n: int, d: int, seed: int
) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    owner = np.repeat(np.arange(n), counts)
    # Small whole numbers: many ties, and products without rounding.
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(-2, 3, (n, d)).astype(np.float32))
    texts = torch.from_numpy(rng.integers(-2, 3, (len(owner), d)).astype(np.float32))
    scores = recall_at_k(images, texts, owner, ks=(1, 2, 5))
    assert recall_at_k(4 * images, texts / 2, owner, ks=(1, 2, 5)) == scores
    assert recall_at_k(images.flip(1), texts.flip(1), owner, ks=(1, 2, 5)) == scores
    order = rng.permutation(len(owner))
    assert recall_at_k(images, texts[order], owner[order], ks=(1, 2, 5)) == scores
    place = rng.permutation(n)  # place[i]: where image i goes
    moved = torch.empty_like(images)
    moved[place] = images
    again = recall_at_k(moved, texts, place[owner], ks=(1, 2, 5))
    assert again == pytest.approx(scores)
    for side in ("IR", "TR"):
        assert 0 <= scores[f"{side}@1"] <= scores[f"{side}@2"] <= scores[f"{side}@5"] <= 100


# -- readers ---------------------------------------------------------------------------------------

TEXTS = st.lists(st.text(max_size=20), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        Image.new("RGB", (3, 3), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def expected(captions: list[list[str]]) -> dict[str, list[str]]:
    """By image, what a reader keeps: whole characters, single spaces, nothing blank."""
    kept = {}
    for i, texts in enumerate(captions):
        words = [whole_characters(" ".join(text.split())) for text in texts]
        if any(words):
            kept[f"{i}.png"] = [text for text in words if text]
    return kept


def check(read: Callable[..., Any], captions: list[list[str]], *words: Any, **more: Any) -> None:
    from mmdd.errors import DataError

    wanted = expected(captions)
    if not wanted:
        with pytest.raises(DataError):
            read(*words, on_error="drop", progress=False, **more)
        return
    data = read(*words, on_error="drop", progress=False, **more)
    assert data.captions == list(wanted.values())
    split_of = seeded_split(list(wanted))
    found = {int(i): split for split in data.splits for i in data.indices(split)}
    assert [found[row] for row in range(len(data))] == [split_of[name] for name in wanted]


@FILES
@given(captions=st.lists(TEXTS, min_size=5, max_size=5))
def test_any_captions_come_through_json(
    images: Path, tmp_path: Path, captions: list[list[str]]
) -> None:
    entries = [
        {"filename": f"{i}.png", "sentences": [{"raw": text} for text in texts]}
        for i, texts in enumerate(captions)
    ]
    path = tmp_path / "dataset_any.json"
    path.write_text(json.dumps({"images": entries}))
    check(read_karpathy, captions, path, images, 8, tmp_path / "cache")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(5)],
        "annotations": [
            {"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts
        ],
    }
    path = tmp_path / "captions_any.json"
    path.write_text(json.dumps(coco))
    check(read_coco_captions, captions, path, images, 8, tmp_path / "cache")


@FILES
@given(captions=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1,
                                  max_size=3), min_size=5, max_size=5))  # fmt: skip
def test_any_captions_come_through_csv(
    images: Path, tmp_path: Path, captions: list[list[str]]
) -> None:
    table = io.StringIO(newline="")
    rows = csv.writer(table, quoting=csv.QUOTE_ALL)
    rows.writerow(["image", "caption"])
    rows.writerows((f"{i}.png", text) for i, texts in enumerate(captions) for text in texts)
    path = tmp_path / "captions.txt"
    path.write_bytes(table.getvalue().encode())
    check(read_flickr8k, captions, path, images, 8, tmp_path / "cache")
