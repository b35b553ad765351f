"""Mechanisms: what is counted, the file, and that it holds what the code measures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdd import evaluation
from mmdd.batches import real_pairs
from mmdd.claims import (
    Evidence,
    Measurements,
    judge,
    load_claims,
    load_measurements,
    measurements,
)
from mmdd.claims.measure import (
    CLUSTERED,
    MEASURES,
    RESET,
    SEEDS,
    SETS,
    STEPS,
    STUDENTS,
    caption_embeddings,
    clustering,
    covariance_rank,
    directions,
    feature_drift,
    random_pairs,
)
from mmdd.claims.measurements import code_today
from mmdd.data.open import open_dataset
from mmdd.distill import CovMatch
from mmdd.encoders import build_model
from mmdd.errors import StoreError
from mmdd.gallery import SHOWN
from mmdd.losses import info_nce
from mmdd.presets import preset
from mmdd.runs import evaluate_file, initial_pairs, load_results
from mmdd.synthetic import SyntheticPairs

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "mechanisms.json"
FOLDER = ROOT / "results" / "shown"


def test_directions_of_known_spectra():
    assert directions(torch.eye(8), 0.99) == 8
    assert directions(torch.eye(8), 0.5) == 4
    assert directions(torch.ones(5, 7), 0.99) == 1
    # squares 100, 1, 1: the first holds 98 %
    assert directions(torch.diag(torch.tensor([1.0, 10.0, 1.0])), 0.98) == 1
    assert directions(torch.diag(torch.tensor([1.0, 10.0, 1.0])), 0.99) == 2


def test_clustering_is_that_of_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    owner = np.array([0, 0, 1, 1, 1, 2])
    vectors = rng.normal(size=(6, 4)).astype(np.float32)
    within, between = [], []
    for i in range(6):
        for j in range(i):
            a, b = vectors[i].astype(float), vectors[j].astype(float)
            cosine = a @ b / np.sqrt((a @ a) * (b @ b))
            (within if owner[i] == owner[j] else between).append(cosine)
    assert (len(within), len(between)) == (4, 11)
    found = clustering(torch.from_numpy(vectors), owner)
    assert found == pytest.approx((np.mean(within), np.mean(between)))
    # One point an image: within is 1; opposite images: between is -1.
    ends = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]])
    assert clustering(ends, np.array([0, 0, 1, 1])) == pytest.approx((1, -1))


def test_the_committed_file_has_every_measure_and_three_seeds():
    found = load_measurements(COMMITTED)
    assert set(found.values) == set(MEASURES)
    assert all(len(values) == 3 for values in found.values.values())
    assert set(found.deviation) == set(CLUSTERED)
    assert all(0 < value < 0.2 for value in found.deviation.values())
    assert tuple(found.steps) == STEPS
    for side in ("image", "text"):
        curves = np.array(found.curves[side])
        assert curves.shape == (len(SEEDS), len(STEPS))
        assert curves[:, 0] == pytest.approx(1, abs=1e-4)  # nothing has moved yet
        at_reset = found.values[f"cosine of {side} features"]
        assert curves[:, STEPS.index(RESET)].tolist() == at_reset
    for measure, name in CLUSTERED.items():
        cosines = np.array(found.cosines[name])
        assert cosines.shape == (len(STUDENTS), 2)
        assert cosines[:, 0] - cosines[:, 1] == pytest.approx(found.values[measure], abs=2e-4)
    assert set(found.maps) == {"random pairs", *CLUSTERED.values()}
    assert all(np.array(places).shape == (60, 2) for places in found.maps.values())


def test_the_committed_file_was_measured_with_todays_code():
    found = load_measurements(COMMITTED)
    assert not found.stale, "python -m mmdd.claims results/mechanisms.json"
    assert code_today(FOLDER) in found.origin


def test_another_set_other_settings_and_other_code_make_it_stale(tmp_path, monkeypatch):
    file = shutil.copy(COMMITTED, tmp_path / "mechanisms.json")
    assert load_measurements(file).stale  # no set is beside it
    (tmp_path / "shown").mkdir()
    for name in CLUSTERED.values():
        shutil.copy(FOLDER / f"{name}.safetensors", tmp_path / "shown")
    assert not load_measurements(file).stale
    one = tmp_path / "shown" / f"{next(iter(CLUSTERED.values()))}.safetensors"
    whole = one.read_bytes()
    one.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert load_measurements(file).stale
    one.write_bytes(whole)

    other = [preset("small", method="covmatch", pairs=20, protocol="both", seed=7)]
    with monkeypatch.context() as patched:
        patched.setattr(measurements.measure, "configurations", lambda: other)
        assert load_measurements(file).stale
    # Comments and docstrings count as little as in a record; a changed number does.
    text = Path(measurements.measure.__file__).read_text(encoding="utf-8")
    changed = tmp_path / "measure.py"
    other_number = text.replace("_IMAGES = 200", "_IMAGES = 201")
    for new, stale in ((f"# a comment\n{text}", False), (other_number, True)):
        changed.write_text(new, encoding="utf-8")
        with monkeypatch.context() as patched:
            patched.setattr(measurements.measure, "__file__", str(changed))
            assert load_measurements(file).stale is stale


def test_what_the_chapters_say_of_the_committed_numbers():
    """Chapter 07 of its figure, chapter 15 of its table: when this changes, so must the texts."""
    found = load_measurements(COMMITTED)
    image, text = (np.array(found.curves[side]) for side in ("image", "text"))
    at = {step: i for i, step in enumerate(STEPS)}
    assert (image[:, at[RESET]] > 0.97).all()  # nearly fixed between two resets
    # half of the way within the first twenty-five, to about 0.91, and after fifty below 0.9
    half = (1 - text[:, at[25]]) / (1 - text[:, at[300]])
    assert half.mean() == pytest.approx(0.5, abs=0.05)
    assert text.mean(0)[at[25]] == pytest.approx(0.91, abs=0.005)
    assert (text[:, at[RESET]] < 0.9).all()
    assert (np.diff(text.mean(0))[at[50] :] < 0).all()  # and on, without the reset
    assert image.mean(0)[at[300]] == pytest.approx(text.mean(0)[at[RESET]], abs=0.02)
    apart = {name: np.subtract(*np.transpose(rows)) for name, rows in found.cosines.items()}
    for name in CLUSTERED.values():  # much closer than after random pairs, and all alike
        assert (apart[name] > apart["random pairs"] + 0.08).all()
        assert apart[name].mean() == pytest.approx(apart["scenes-lors-49"].mean(), abs=0.02)
    evidence = Evidence(load_results(ROOT / "none"), found)
    claims = {c.id: c for c in load_claims() if c.id.startswith("captions-cluster")}
    verdicts = [judge(claim, evidence).verdict for claim in claims.values()]
    assert verdicts == ["inconclusive"] * 2


@pytest.mark.slow
def test_the_committed_numbers_are_what_the_code_measures():
    found = load_measurements(COMMITTED)
    ranks = found.values["covariance rank (% of the dimension)"]
    assert covariance_rank(seeds=(1,)) == pytest.approx(ranks[1:2], abs=1.6)  # two directions
    drift = feature_drift(0, last=20)
    for side in ("image", "text"):
        assert drift[side] == pytest.approx(found.curves[side][0][:5], abs=0.005)


@pytest.mark.slow
def test_the_drift_is_that_of_a_loop_written_out():
    """Ten steps of SGD on InfoNCE of real pairs, without CovMatch's class."""
    config = preset("small", method="covmatch", pairs=20, protocol="both")
    dataset = open_dataset(config.dataset, config.runtime)
    model = build_model(config.model)
    settings = config.settings
    assert (settings.model_momentum, settings.update, settings.freeze) == (0.9, "real", "none")
    drawn = []  # the real batches of the method
    original = CovMatch.real_batch

    def remember(self, size, stream, iteration):
        drawn.append(original(self, size, stream, iteration))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CovMatch, "real_batch", remember)
        feature_drift.__wrapped__(0, last=10)
    assert len(drawn) == 10
    model.eval()
    model.reset_heads(seed=1_000_003)
    images, choice = dataset.draw("train", 200, np.random.default_rng(0))
    watched = real_pairs(dataset, images, choice, model, "both")

    def features():
        with torch.no_grad():
            text = model.text_features(watched.texts, watched.text_mask)
            return model.image_features(watched.images), text

    start = features()
    layers = [p for n, p in model.text_encoder.named_parameters() if ".embeddings." not in n]
    heads = [*model.image_head.parameters(), *model.text_head.parameters()]
    groups = [
        {"params": list(model.image_encoder.parameters()), "lr": settings.model_lr_image},
        {"params": layers, "lr": settings.model_lr_text},
        {"params": heads, "lr": settings.model_lr_heads},
    ]
    optimiser = torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.model_weight_decay)
    for batch in drawn:
        z_image, z_text = model(batch.images, batch.texts, batch.mask)
        optimiser.zero_grad()
        info_nce(z_image, z_text, settings.temperature).backward()
        optimiser.step()
    found = feature_drift(0, last=20)
    for side, a, b in zip(("image", "text"), start, features(), strict=True):
        cosine = F.cosine_similarity(a - a.mean(0), b - a.mean(0)).mean().item()
        assert cosine == pytest.approx(found[side][2], abs=2e-3)


@pytest.mark.slow
def test_a_student_of_the_captions_is_the_one_of_the_record():
    """Its embeddings of captions give the recall of `evaluate` with its embeddings of images."""
    name = "scenes-lors-49"
    config = preset("small", **SHOWN[name])
    once = {"evaluation": config.evaluation.model_copy(update={"students": 1, "scores": 1})}
    runtime = config.runtime.model_copy(update={"progress": False, "threads": 1})
    kept = []
    with pytest.MonkeyPatch.context() as patched:
        original = evaluation.train_student

        def keep(*arguments, **named):
            kept.append(original(*arguments, **named))
            return kept[-1]

        patched.setattr(evaluation, "train_student", keep)
        evaluate_file(
            FOLDER / f"{name}.safetensors", config.model_copy(update=once | {"runtime": runtime})
        )
    dataset = open_dataset(config.dataset, config.runtime)
    texts, owner = dataset.caption_table("test")
    ids, mask = kept[0].text_encoder.tokenize(texts)
    with torch.no_grad():
        theirs = kept[0].embed_texts(kept[0].eval().text_features(ids, mask))
    ours = caption_embeddings(FOLDER, name, 0)
    assert (ours - theirs).abs().max() < 1e-4
    found = load_measurements(COMMITTED).cosines[name][0]
    assert clustering(ours, owner) == pytest.approx(found, abs=5e-3)


def test_the_sets_are_what_the_gallery_says_of_them():
    assert set(CLUSTERED.values()) == set(SETS)
    assert {name: SHOWN[name] for name in SETS} == SETS


def test_the_random_pairs_are_those_that_the_sets_began_with():
    config = random_pairs()
    assert (config.method, config.pairs, config.seed) == ("random", 50, 0)
    about = SyntheticPairs.load(FOLDER / "scenes-covmatch-50.safetensors").metadata
    dataset = open_dataset(config.dataset, config.runtime)
    found = initial_pairs(config, dataset, build_model(config.model)).metadata
    assert found["source_images"] == about["source_images"]


def test_a_file_of_something_else_is_refused_and_none_is_nothing(tmp_path):
    assert load_measurements(tmp_path / "none.json") == Measurements()
    whole = json.loads(COMMITTED.read_text(encoding="utf-8"))
    broken = [whole | {"values": {"a": ["x"]}}, {"values": whole["values"]}]
    for text in ("[", "[1]", '{"values": [1]}', *map(json.dumps, broken)):
        path = tmp_path / "m.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match=r"m\.json"):
            load_measurements(path)
