"""The tool that keeps a learned matrix for the book without the images it belongs to."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from mmdd.files import load_tensors
from mmdd.similarity import LowRankSimilarity
from mmdd.synthetic import SyntheticPairs

TOOL = str(Path(__file__).parents[1] / "tools" / "keep_similarity.py")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [TOOL, *words])
    runpy.run_path(TOOL, run_name="__main__")


def test_keep_similarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = LowRankSimilarity(4, 2, 1.0)
    with torch.no_grad():
        similarity.right += 0.5
    about = {"method": "lors", "settings": {"rank": 2}, "set_id": "ab", "source_hash": "cd"}
    pairs = SyntheticPairs(
        torch.rand(4, 3, 8, 8), torch.rand(4, 5), similarity=similarity, metadata=about
    )
    pairs.save(tmp_path / "set.safetensors")
    target = tmp_path / "kept.safetensors"
    run(monkeypatch, str(tmp_path / "set.safetensors"), str(target))
    tensors, header = load_tensors(target)
    assert set(tensors) == {"similarity"}
    assert torch.equal(tensors["similarity"], similarity.matrix())
    assert header == {"format": "mmdd.similarity"} | about


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain.safetensors"
    SyntheticPairs(torch.rand(4, 3, 8, 8), torch.rand(4, 5)).save(plain)
    with pytest.raises(SystemExit, match="no learned similarity"):
        run(monkeypatch, str(plain), str(tmp_path / "kept.safetensors"))
    with pytest.raises(SystemExit, match=r"keep_similarity\.py results"):
        run(monkeypatch)
