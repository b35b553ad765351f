"""Choosing real pairs: what holds for every selection."""

import numpy as np
import pytest
import torch

from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.encoders import DualEncoder, ModelConfig, build_model
from mmdd.errors import ConfigError
from mmdd.selection import SELECTORS, Candidates, Selection, SelectionConfig, select

MODEL = ModelConfig(dim=12)
CONFIG = SelectionConfig(warm_up_epochs=2, forgetting_epochs=3, batch_size=16, lr_image=0.01)


@pytest.fixture(scope="module")
def scenes() -> PairDataset:
    return Scenes.generate({"train": 30, "val": 5, "test": 5})


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build_model(MODEL)


def choose(
    name: str,
    scenes: PairDataset,
    model: DualEncoder,
    pairs: int,
    seed: int = 0,
    cache: bool = True,
) -> Selection:
    config = MODEL.model_dump(mode="json") if cache else {}
    return select(name, scenes, pairs, seed, Candidates(scenes, seed, model, config, CONFIG))


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("pairs", [1, 10, 30])
def test_chosen_pairs(scenes: PairDataset, model: DualEncoder, name: str, pairs: int) -> None:
    images, choice = choose(name, scenes, model, pairs)
    assert len(images) == len(choice) == pairs == len(set(images.tolist()))
    assert set(images.tolist()) <= set(scenes.indices("train").tolist())
    assert images.dtype == choice.dtype == np.int64
    assert all(0 <= c < len(scenes.captions[i]) for i, c in zip(images, choice, strict=True))


@pytest.mark.parametrize("name", SELECTORS)
def test_the_seed_decides(scenes: PairDataset, model: DualEncoder, name: str) -> None:
    """Computed twice, without the cache; the global generators have no say and are left alone."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    first = choose(name, scenes, model, 10, cache=False)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again = choose(name, scenes, model, 10, cache=False)
    assert torch.equal(torch.rand(3), expected)
    kept = choose(name, scenes, model, 10)
    for other in (again, kept):
        assert first[0].tolist() == other[0].tolist()
        assert first[1].tolist() == other[1].tolist()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", SELECTORS)
def test_seeds_choose_differently(scenes: PairDataset, model: DualEncoder, name: str) -> None:
    found = [choose(name, scenes, model, 10, seed)[0].tolist() for seed in range(3)]
    assert found[0] != found[1] != found[2]


def test_random_gives_every_image_and_any_caption(scenes: PairDataset) -> None:
    everything, choice = select("random", scenes, 30, 2)
    assert sorted(everything.tolist()) == scenes.indices("train").tolist()
    assert len(set(choice.tolist())) == 5


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "random"])
def test_each_image_comes_with_its_candidate_caption(
    scenes: PairDataset, model: DualEncoder, name: str
) -> None:
    images, choice = choose(name, scenes, model, 30)
    all_images, all_choices = Candidates(scenes, 0).pairs
    caption = dict(zip(all_images.tolist(), all_choices.tolist(), strict=True))
    assert [caption[i] for i in images.tolist()] == choice.tolist()


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("pairs", [0, -1, 31])
def test_impossible_numbers(scenes: PairDataset, name: str, pairs: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot choose {pairs} pairs: .*'scenes' has 30"):
        select(name, scenes, pairs, 0)


def test_unknown_name(scenes: PairDataset) -> None:
    with pytest.raises(ConfigError, match="unknown selection 'best'; known: random, herding"):
        select("best", scenes, 3, 0)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "random"])
def test_a_model_is_needed(scenes: PairDataset, name: str) -> None:
    with pytest.raises(ConfigError, match="goes by features: give `select` a model"):
        select(name, scenes, 3, 0)
