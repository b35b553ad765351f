"""Forgetting: who is right in a batch, how events are counted, and over a real training."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmdd.data.scenes import Scenes
from mmdd.encoders import ModelConfig, build_model
from mmdd.losses import info_nce
from mmdd.selection import Candidates, SelectionConfig
from mmdd.selection.forgetting import (
    ForgettingCounts,
    both_rank_one,
    forgetting_scores,
    least_forgotten,
)


@pytest.mark.parametrize("seed", range(4))
def test_both_directions_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z_text = F.normalize(torch.randn(12, 4, generator=generator), dim=1)
    z_image = F.normalize(z_text + 0.4 * torch.randn(12, 4, generator=generator), dim=1)
    expected = []
    for i in range(12):
        to_text = [float(z_image[i] @ z_text[j]) for j in range(12)]
        to_image = [float(z_image[j] @ z_text[i]) for j in range(12)]
        expected.append(
            all(to_text[i] > s for j, s in enumerate(to_text) if j != i)
            and all(to_image[i] > s for j, s in enumerate(to_image) if j != i)
        )
    found = both_rank_one(z_image, z_text)
    assert found.tolist() == expected
    assert 0 < sum(expected) < 12


def test_copies_are_never_right() -> None:
    z = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), dim=1)
    assert both_rank_one(z, z).tolist() == [True, False, False]
    assert both_rank_one(-z[:1], z[:1]).tolist() == [True]  # alone


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8))
def test_events(epochs: list[list[bool]]) -> None:
    """epochs[t][i]: whether pair i was right in epoch t; fed in two batches per epoch."""
    counts = ForgettingCounts(5)
    order = np.random.default_rng(0).permutation(5)
    for outcome in epochs:
        for rows in (order[:3], order[3:]):
            counts.update(rows, np.array(outcome)[rows])
    expected = []
    for i in range(5):
        outcomes = [outcome[i] for outcome in epochs]
        events = sum(a and not b for a, b in pairwise(outcomes))
        expected.append(events if any(outcomes) else len(epochs))
    assert counts.scores().tolist() == expected
    assert all(  # whoever was never right comes after everybody who was
        a < b
        for a, i in zip(expected, range(5), strict=True)
        for b, j in zip(expected, range(5), strict=True)
        if any(o[i] for o in epochs) and not any(o[j] for o in epochs)
    )


def test_least_forgotten() -> None:
    scores = np.array([3, 0, 0, 1, 0, 9, 0])
    found = {tuple(least_forgotten(scores, 2, np.random.default_rng(s))) for s in range(50)}
    assert len(found) == 12  # any ordered two of the four
    assert set(np.ravel(list(found)).tolist()) == {1, 2, 4, 6}
    everything = least_forgotten(scores, 7, np.random.default_rng(0)).tolist()
    assert sorted(everything[:4]) == [1, 2, 4, 6]
    assert everything[4:] == [3, 0, 5]


def test_over_a_training_written_out() -> None:
    """The counts of a real warm-up, against the same training step by step."""
    scenes = Scenes.generate({"train": 49, "val": 5, "test": 5})
    model = build_model(ModelConfig(dim=12))
    config = SelectionConfig(forgetting_epochs=6, batch_size=16, lr_image=0.02, lr_heads=0.5)
    candidates = Candidates(scenes, 3, model, {}, config)
    found = forgetting_scores(candidates)

    own = deepcopy(model)
    own.reset_heads(500_003)
    own.train()
    images, choice = candidates.pairs
    caption = dict(zip(images.tolist(), choice.tolist(), strict=True))
    rates = {"image_encoder": 0.02, "image_head": 0.5, "text_head": 0.5}
    trained = {n: p for n, p in own.named_parameters() if not n.startswith("text_encoder.")}
    history: dict[int, list[bool]] = {i: [] for i in images.tolist()}
    for epoch in range(6):
        scale = 1.0 if epoch < 3 else 0.1
        for batch, _ in scenes.batches("train", 16, 500_003, epoch):
            if len(batch) < 2:
                continue  # one pair alone has nothing to be told from
            x = torch.tensor(scenes.images[batch].transpose(0, 3, 1, 2)).float() / 255
            ids, mask = own.text_encoder.tokenize([scenes.captions[i][caption[i]] for i in batch])
            with torch.no_grad():
                h = own.text_encoder.encode(own.text_encoder.embed(ids), mask)
            z_image = F.normalize(own.image_head(own.image_encoder(x)), dim=1)
            z_text = F.normalize(own.text_head(h), dim=1)
            scores = (z_image @ z_text.T).detach()
            for row, i in enumerate(batch.tolist()):
                right = scores[row].argmax() == row and scores[:, row].argmax() == row
                history[i].append(bool(right))
            gradients = torch.autograd.grad(info_nce(z_image, z_text), list(trained.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                    parameter -= scale * rates[name.split(".")[0]] * gradient
    assert {len(h) for h in history.values()} == {5, 6}  # some sat alone in the last batch
    expected = []
    for i in images.tolist():
        h = history[i]
        events = sum(a and not b for a, b in pairwise(h))
        expected.append(events if any(h) else 6)
    assert found.tolist() == expected
    assert {0, 6} <= set(found.tolist())
    assert any(0 < score < 6 for score in found)
