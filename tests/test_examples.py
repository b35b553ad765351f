"""The training loop without mmdd: it runs, it learns, and its committed scores are its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdd.encoders import build_model
from mmdd.export import export_tensors, export_test_split
from mmdd.files import file_sha256
from mmdd.gallery import SHOWN
from mmdd.losses import info_nce
from mmdd.presets import preset
from mmdd.retrieval import recall_at_k
from mmdd.runs import load_results
from mmdd.synthetic import SyntheticPairs
from tools.record_stock_training import PROTOCOL, RECORD, SCRIPT, WEIGHTS

ROOT = Path(__file__).parents[1]
SHOWN_SET = ROOT / "results" / "shown" / "scenes-covmatch-50.safetensors"
STOCK = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set that ships and the test split, as plain tensors."""
    folder = tmp_path_factory.mktemp("exported")
    config = preset("small", **SHOWN["scenes-covmatch-50"])
    pairs = SyntheticPairs.load(SHOWN_SET)
    return (
        export_tensors(pairs, folder / "set.safetensors"),
        export_test_split(config, folder / "test.safetensors"),
    )


def example(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The example in a process in which importing mmdd fails."""
    (folder / "mmdd.py").write_text("raise ImportError('the example imports mmdd')\n")
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_example_scores_what_the_book_shows(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = example(*files, "--weights", WEIGHTS, "--seeds", "1", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)["seeds"][0]
    (recorded,) = [s for s in STOCK["sets"] if s["method"] == "covmatch"]
    # Another processor rounds sums differently, which moves some ranks of 1,500 captions.
    assert found["mean"] == pytest.approx(recorded["seeds"][0]["mean"], abs=1.5)


def test_it_refuses_tokens(tmp_path: Path) -> None:
    save_file(
        {"images": torch.zeros(2, 3, 32, 32), "texts": torch.zeros(2, 5, 64)}, tmp_path / "set"
    )
    done = example(tmp_path / "set", "test", "--weights", WEIGHTS, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "this loop takes text vectors; the set has token embeddings\n"


def test_its_parts_are_those_of_the_package(files: tuple[Path, Path]) -> None:
    """The tower has the shipped encoder's features, the loss is InfoNCE, recall is recall."""
    scope: dict[str, Any] = {"__name__": "example"}
    exec(SCRIPT.read_text(), scope)
    torch.manual_seed(3)
    clip = scope["Clip"](64, str(WEIGHTS))
    images = torch.rand(4, 3, 32, 32)
    ours = build_model(preset("small").model)
    ours.image_head.load_state_dict(clip.image.head.state_dict())
    ours.text_head.load_state_dict(clip.text.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(clip.image(images), ours.image_head(ours.image_features(images)))
        z_image, z_text, scale = clip(images, torch.randn(4, 64))
        assert scale.item() == pytest.approx(1 / 0.07)
        loss = scope["clip_loss"](z_image, z_text, scale, torch.eye(4))
        torch.testing.assert_close(loss, info_nce(z_image, z_text, 0.07))
        test = load_file(files[1])
        expected = recall_at_k(
            ours.embed_images(test["images"].float() / 255),
            ours.embed_texts(test["texts"]),
            test["image_of_text"],
        )
    assert scope["recall"](clip, str(files[1])) == pytest.approx(expected, abs=0.1)


def test_the_committed_scores_are_of_the_sets_that_ship() -> None:
    assert STOCK["protocol"] == PROTOCOL
    assert STOCK["script_sha256"] == file_sha256(SCRIPT), "run tools/record_stock_training.py again"
    runs = load_results(ROOT / "results")
    expected = {preset("small", **w).run_id: w for w in SHOWN.values() if w["protocol"] == PROTOCOL}
    found = {s["run_id"] for s in STOCK["sets"] if s["method"] != "random"}
    assert found == set(expected)
    for entry in STOCK["sets"]:
        assert entry["run_id"] in set(runs["run_id"]), "no score of the package to stand beside"
        means = [scores["mean"] for scores in entry["seeds"]]
        assert len(means) == 5
        assert entry["mean"] == pytest.approx(sum(means) / 5)
    scores = {(s["method"], s["targets"]): s["mean"] for s in STOCK["sets"]}
    assert scores["covmatch", "own"] > 2 * scores["random", "own"]
