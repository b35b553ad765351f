"""Variance within and without classes, against sums written out and constructed data."""

import numpy as np
import pytest
import torch

from mmdd.data import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.encoders import ModelConfig, build_model
from mmdd.errors import DataError
from mmdd.variance import (
    BINS,
    clustered,
    clustered_gaussian,
    cosine_histogram,
    describe,
    describe_pairs,
    image_features,
    spread,
    text_features,
    unit,
    variance,
    variance_within,
)


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(30, 4)) * [1.0, 2.0, 0.5, 3.0] + 1.0


def test_variance_is_that_of_the_entries(features: np.ndarray) -> None:
    by_hand = [sum((x - column.mean()) ** 2 for x in column) / 29 for column in features.T]
    assert variance(features) == pytest.approx(sum(by_hand) / 4)
    assert variance(10 * features) == pytest.approx(100 * variance(features))


def test_within_classes(features: np.ndarray) -> None:
    labels = np.arange(30) % 3
    parts = [features[labels == k] for k in range(3)]
    by_hand = sum(((p - p.mean(axis=0)) ** 2).sum() for p in parts) / (4 * (30 - 3))
    assert variance_within(features, labels) == pytest.approx(by_hand)
    # The variance about the common mean is that within the classes and that between them.
    between = sum(len(p) * ((p.mean(axis=0) - features.mean(axis=0)) ** 2).sum() for p in parts)
    assert variance(features) * 29 == pytest.approx(by_hand * 27 + between / 4)
    # One class for all is no class; a shift of a whole class changes nothing.
    assert variance_within(features, np.zeros(30)) == pytest.approx(variance(features))
    shifted = features + 7.0 * labels[:, None]
    assert variance_within(shifted, labels) == pytest.approx(by_hand)


def test_spread_is_the_mean_cosine_distance(features: np.ndarray) -> None:
    normed = features / np.sqrt((features**2).sum(axis=1, keepdims=True))
    distances = [1 - normed[i] @ normed[j] for i in range(30) for j in range(i)]
    assert spread(features) == pytest.approx(np.mean(distances))
    assert spread(features * np.linspace(1, 5, 30)[:, None]) == pytest.approx(spread(features))
    assert spread(features, np.zeros(30)) == pytest.approx(spread(features))


def test_what_is_undefined_is_refused(features: np.ndarray) -> None:
    with pytest.raises(DataError, match="fewer than two"):
        variance(features[:1])
    with pytest.raises(DataError, match="no class has two"):
        variance_within(features, np.arange(30))


def test_clusters_are_told_from_a_gaussian() -> None:
    rng = np.random.default_rng(1)
    centres = 3 * np.eye(8)[:5]
    lumps = centres[rng.integers(5, size=300)] + 0.2 * rng.normal(size=(300, 8))
    assert clustered(lumps, 5) < 0.1
    assert clustered_gaussian(lumps, 5) > 3 * clustered(lumps, 5)
    ball = rng.normal(size=(300, 8))
    assert clustered_gaussian(ball, 5) == pytest.approx(clustered(ball, 5), abs=0.1)


def test_the_histogram_counts_every_pair_once(features: np.ndarray) -> None:
    shares = cosine_histogram(features)
    assert len(shares) == len(BINS) - 1
    assert sum(shares) == pytest.approx(1)
    middle = (BINS[1:] + BINS[:-1]) / 2
    # To the width of a bin its mean is that of the cosines, which is 1 - spread.
    assert np.dot(shares, middle) == pytest.approx(1 - spread(features), abs=0.025)
    assert cosine_histogram(np.ones((3, 2)))[-1] == 1.0


def test_describe(features: np.ndarray) -> None:
    plain = describe(features)
    assert (plain["n"], plain["d"]) == (30, 4)
    assert "spread_within" not in plain
    labelled = describe(features, np.arange(30) % 3)
    assert labelled["variance_within"] == variance_within(features, np.arange(30) % 3)
    assert {k: labelled[k] for k in plain} == plain


def test_pairs_are_described_by_image_text_and_both() -> None:
    scenes = Scenes.generate({"train": 24})
    model = build_model(ModelConfig(pair="scenes-tiny"))
    members = scenes.indices("train")[:20]
    found = describe_pairs(scenes, members, {"pixels": None, "tiny": model}, model)
    raw = image_features(scenes.images[members], None)
    assert raw.shape == (20, 3 * 32 * 32)
    assert raw.max() <= 1
    assert found["images"]["pixels"]["spread"] == pytest.approx(spread(raw))
    images = image_features(scenes.images[members], model, block=7)
    assert found["images"]["tiny"]["variance"] == pytest.approx(variance(images))
    words = text_features([t for i in members for t in scenes.captions[i]], model, block=13)
    assert found["texts"]["n"] == len(words) == 100
    owner = np.repeat(np.arange(20), 5)
    assert found["texts"]["spread_within"] == pytest.approx(spread(words, owner))
    # Pairs: both features of length 1, so the spread is the mean of the two.
    halves = (spread(images) + spread(words[::5])) / 2
    assert found["pairs"]["spread"] == pytest.approx(halves, abs=1e-5)
    with torch.no_grad():
        first = model.text_features(*model.text_encoder.tokenize([scenes.captions[members[3]][0]]))
    assert unit(words)[15] == pytest.approx(unit(first.numpy())[0], abs=1e-5)


def test_a_picture_may_have_any_number_of_captions() -> None:
    scenes = Scenes.generate({"train": 12})
    captions = [texts[: 1 + i % 3] for i, texts in enumerate(scenes.captions)]
    uneven = PairDataset(scenes.images, captions, scenes.splits, name="uneven")
    model = build_model(ModelConfig(pair="scenes-tiny"))
    found = describe_pairs(uneven, uneven.indices("train"), {"tiny": model}, model)
    assert found["texts"]["n"] == sum(map(len, captions))
    assert found["pairs"]["n"] == 12
