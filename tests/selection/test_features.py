"""The warmed-up features: what they are, that they are kept, and what a hit costs."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdd.batches import RealBatches
from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.encoders import PAIRS, DualEncoder, ModelConfig, build_model
from mmdd.errors import NonFiniteError
from mmdd.evaluation import SplitScorer
from mmdd.losses import info_nce
from mmdd.selection import Candidates, SelectionConfig
from mmdd.selection import features as module
from mmdd.selection.features import features, pairs_of, warm_up

MODEL = ModelConfig(dim=12)
CONFIG: dict[str, Any] = {"warm_up_epochs": 2, "batch_size": 16, "lr_image": 0.01, "lr_heads": 0.3}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> PairDataset:
    return Scenes.generate({"train": 40, "val": 20, "test": 5})


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build_model(MODEL)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMDD_CACHE", str(tmp_path))
    return tmp_path / "features"


def make(
    scenes: PairDataset,
    model: DualEncoder | None,
    seed: int = 0,
    named: bool = True,
    **changes: Any,
) -> Candidates:
    config = MODEL.model_dump(mode="json") if named else {}
    return Candidates(scenes, seed, model, config, SelectionConfig(**(CONFIG | changes)))


def test_against_a_warm_up_written_out(scenes: PairDataset, model: DualEncoder) -> None:
    """SGD on InfoNCE over shuffled batches with random captions; rates fall after half."""
    found = features(make(scenes, model, warm_up_epochs=3))
    own = deepcopy(model)
    own.reset_heads(500_000)
    vectors = {}
    with torch.no_grad():
        for i in scenes.indices("train").tolist():
            ids, mask = own.text_encoder.tokenize(scenes.captions[i])
            vectors[i] = own.text_encoder.encode(own.text_encoder.embed(ids), mask)
    trained = {n: p for n, p in own.named_parameters() if not n.startswith("text_encoder.")}
    own.train()
    for epoch in range(3):
        rate = {"image_encoder": 0.01, "image_head": 0.3, "text_head": 0.3}
        scale = 1.0 if epoch < 1 else 0.1
        for images, choice in scenes.batches("train", 16, 500_000, epoch):
            x = torch.tensor(scenes.images[images].transpose(0, 3, 1, 2)).float() / 255
            h = torch.stack([vectors[i][c] for i, c in zip(images.tolist(), choice, strict=True)])
            p_image, p_text = own.image_head(own.image_encoder(x)), own.text_head(h)
            z_image = p_image / p_image.norm(dim=1, keepdim=True)
            z_text = p_text / p_text.norm(dim=1, keepdim=True)
            loss = info_nce(z_image, z_text, 0.07)
            gradients = torch.autograd.grad(loss, list(trained.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                    parameter -= scale * rate[name.split(".")[0]] * gradient
    own.eval()
    candidates = make(scenes, model)
    images, choice = candidates.pairs
    with torch.no_grad():
        x = torch.tensor(scenes.images[images].transpose(0, 3, 1, 2)).float() / 255
        h = torch.stack([vectors[i][c] for i, c in zip(images.tolist(), choice, strict=True)])
        z_image, z_text = own.image_head(own.image_encoder(x)), own.text_head(h)
    z_image, z_text = (z / z.norm(dim=1, keepdim=True) for z in (z_image, z_text))
    np.testing.assert_allclose(found.image, z_image.numpy(), atol=2e-4)
    np.testing.assert_allclose(found.text, z_text.numpy(), atol=2e-4)
    np.testing.assert_array_equal(found.joint, np.hstack([found.image, found.text]))
    np.testing.assert_allclose((found.joint**2).sum(axis=1), 2, atol=1e-5)


def test_it_trains_a_copy(scenes: PairDataset, model: DualEncoder) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    candidates = make(scenes, model, warm_up_epochs=20)
    warmed = warm_up(candidates, 20)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for name, parameter in warmed.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (not name.startswith("text_encoder."))
    assert not warmed.training
    scorer = SplitScorer(scenes, "val", model, "image+text_head", CPU)
    cold = warm_up(candidates, 0)
    assert scorer.score(warmed)["mean"] > scorer.score(cold)["mean"] + 5
    for (name, ours), (_, pretrained) in zip(
        cold.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, pretrained) == ("encoder" in name)


def test_images_are_in_blocks(
    scenes: PairDataset, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = features(make(scenes, model, named=False, warm_up_epochs=0))
    monkeypatch.setattr(module, "_BLOCK", 7)
    parts = features(make(scenes, model, named=False, warm_up_epochs=0))
    np.testing.assert_allclose(whole.joint, parts.joint, atol=1e-6)


def test_pairs_of(scenes: PairDataset) -> None:
    candidates = make(scenes, None)
    images, choice = pairs_of(candidates, np.array([3, 0]))
    all_images, all_choices = candidates.pairs
    assert images.tolist() == [all_images[3], all_images[0]]
    assert choice.tolist() == [all_choices[3], all_choices[0]]


def test_a_second_look_comes_from_the_cache(
    scenes: PairDataset, model: DualEncoder, cache: Path
) -> None:
    first = make(scenes, model)
    found = features(first)
    assert first.saved_seconds <= 0
    (path,) = cache.glob("*.safetensors")
    stamp = path.stat().st_mtime_ns
    second = make(scenes, model)
    again = features(second)
    np.testing.assert_array_equal(found.joint, again.joint)
    assert second.saved_seconds > 0
    assert path.stat().st_mtime_ns == stamp
    assert len(list(cache.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_made_again(
    scenes: PairDataset, model: DualEncoder, cache: Path, damage: str
) -> None:
    found = features(make(scenes, model))
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "flipped": whole[:-5] + bytes([whole[-5] ^ 64]) + whole[-4:],
            "empty": b"",
            "foreign": b"not a tensor in sight",
        }[damage]
    )
    candidates = make(scenes, model)
    again = features(candidates)
    assert candidates.saved_seconds <= 0
    np.testing.assert_array_equal(found.joint, again.joint)
    mended = make(scenes, model)
    features(mended)
    assert mended.saved_seconds > 0


def test_what_decides_the_features_names_the_file(
    scenes: PairDataset, model: DualEncoder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features(make(scenes, model))
    features(make(scenes, model, seed=1))
    features(make(scenes, model, lr_heads=0.2))
    other = make(scenes, build_model(ModelConfig(dim=8)))
    other.model_config = ModelConfig(dim=8).model_dump(mode="json")
    features(other)
    features(make(Scenes.generate({"train": 39, "val": 20, "test": 5}), model))
    assert len(list(cache.glob("*.safetensors"))) == 5
    monkeypatch.setitem(PAIRS, "scenes-tiny", PAIRS["scenes-resnet"])  # the name says another model
    features(make(scenes, model))
    assert len(list(cache.glob("*.safetensors"))) == 6


def test_a_model_without_a_name_is_not_cached(
    scenes: PairDataset, model: DualEncoder, cache: Path
) -> None:
    features(make(scenes, model, named=False))
    assert not cache.exists()


def test_a_diverging_warm_up_says_what_to_change(scenes: PairDataset, model: DualEncoder) -> None:
    with pytest.raises(NonFiniteError, match=r"lower selection\.lr_image \(1e\+20\)"):
        features(make(scenes, model, lr_image=1e20, warm_up_epochs=5))


def test_given_batches_and_a_watch(scenes: PairDataset, model: DualEncoder) -> None:
    seen = []
    candidates = make(scenes, model)
    real = RealBatches(scenes, "train", model, "image+text_head", CPU)
    warmed = warm_up(candidates, 2, real, lambda *given: seen.append(len(given[2][0])))
    assert seen == [16, 16, 8] * 2
    assert not warmed._forward_hooks
    plain = warm_up(candidates, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(warmed.parameters(), plain.parameters(), strict=True)
    )
