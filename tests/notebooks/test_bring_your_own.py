"""Chapter 18: its method is short, right and resumable, and it appears beside the others."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml
from bs4 import BeautifulSoup

from mmdd.data.open import open_dataset
from mmdd.distill import METHODS, distill
from mmdd.encoders import build_model
from mmdd.errors import ConfigError
from mmdd.presets import preset
from mmdd.runs import initial_pairs, make_context

ROOT = Path(__file__).parents[2]
CHAPTER = ROOT / "notebooks" / "18_bring_your_own.ipynb"
SMALL: dict[str, Any] = {
    "dataset": {"train": 60, "val": 20, "test": 20},
    "evaluation": {"students": 2, "epochs": 1, "scores": 1},
}


def cell(tag: str) -> str:
    notebook = nbformat.read(CHAPTER, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    (found,) = [c for c in code if tag in c.metadata.get("tags", [])]
    return str(found.source)


@pytest.fixture
def registered() -> Iterator[dict[str, Any]]:
    """The method's cell, executed after the imports of the chapter; forgotten afterwards."""
    notebook = nbformat.read(CHAPTER, as_version=4)
    imports = next(c.source for c in notebook.cells if "from mmdd.distill import" in c.source)
    scope: dict[str, Any] = {"__name__": "chapter"}
    exec(imports, scope)
    exec(cell("method"), scope)
    yield scope
    METHODS.pop("my-moments")


def method(protocol: str, scope: dict[str, Any]) -> Any:
    config = preset(
        "tiny", method="my-moments", pairs=6, protocol=protocol, settings={"iterations": 8}, **SMALL
    )
    dataset = open_dataset(config.dataset, config.runtime)
    model = build_model(config.model)
    start = initial_pairs(config, dataset, model)
    context = make_context(config, dataset, model, torch.device("cpu"), start)
    return scope["Moments"](config.settings, context)


def test_the_method_has_less_than_forty_lines() -> None:
    lines = [line for line in cell("method").splitlines() if line.strip()]
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("protocol", ["image+text_head", "both"])
def test_its_loss_is_the_formula_of_the_chapter(protocol: str, registered: dict[str, Any]) -> None:
    """Independently, in numpy and float64, over the whole train split."""
    ours = method(protocol, registered)
    found = ours.backward(0)["loss"]

    def joint(images: Any, texts: Any, mask: Any) -> np.ndarray:
        with torch.no_grad():
            sides = ours.model.image_features(images), ours.model.text_features(texts, mask)
        sides = [side.detach().double().numpy() for side in sides]
        return np.hstack([s / np.linalg.norm(s, axis=1, keepdims=True) for s in sides])

    (batch,) = ours.context.real.epoch(500, ours.seed, 0)
    real = joint(batch.images, batch.texts, batch.mask)
    assert len(real) == 60
    synthetic = joint(ours.set.pixels(), *ours.set.text())
    spread = np.cov(synthetic.T) - np.cov(real.T)
    expected = ((synthetic.mean(0) - real.mean(0)) ** 2).sum()
    expected += (spread**2).sum() / (np.cov(real.T) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.learnables().values())


def test_it_goes_on_from_a_checkpoint_to_the_same_bits(
    registered: dict[str, Any], tmp_path: Path
) -> None:
    whole, progress = distill(method("heads", registered), 8, progress=False)
    assert progress.history["loss"][-1] < progress.history["loss"][0]
    kept = tmp_path / "checkpoint"
    distill(method("heads", registered), 4, checkpoint=kept, progress=False)
    rest, _ = distill(method("heads", registered), 8, checkpoint=kept, progress=False)
    assert torch.equal(whole.images, rest.images)
    assert torch.equal(whole.texts, rest.texts)


def test_a_wrong_key_is_refused(registered: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match="lr_image"):
        preset("tiny", method="my-moments", settings={"lr_image": 1})


@pytest.mark.notebook
@pytest.mark.slow
def test_it_appears_in_the_comparison(tmp_path: Path) -> None:
    """Through papermill with a tiny budget: the table, the figure and the other training loop."""
    output = tmp_path / "out.ipynb"
    parameters = yaml.safe_dump({"wishes": SMALL, "iterations": 2})
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
    done = subprocess.run(
        [*command, str(CHAPTER), str(output), "-y", parameters],
        capture_output=True,
        text=True,
        cwd=CHAPTER.parent,
        env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(output, as_version=4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not any(o.get("name") == "stderr" and "Warning" in o["text"] for o in outputs)
    tables = [
        [[entry.text.strip() for entry in row("th") + row("td")] for row in soup("tr")]
        for o in outputs
        if "text/html" in o.get("data", {})
        for soup in [BeautifulSoup(o["data"]["text/html"], "html.parser")]
    ]
    comparison, stock = (
        next(t for t in tables if any(row[0] == name for row in t))
        for name in ("my-moments", "set")
    )
    rows = {row[0]: row for row in comparison}
    assert {"my-moments", "random", "covmatch", "mtt", "full", "chance"} <= set(rows)
    assert rows["my-moments"][-2:] == ["1", "2"]  # one seed, two students
    assert rows["random"][3] == "1.0"
    sets = {"random", "covmatch", "mdm", "lors", "repblend", "moment-trajectory"}
    assert {row[0] for row in stock[1:]} == sets
    assert not any("not yet run" in row for row in stock)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
