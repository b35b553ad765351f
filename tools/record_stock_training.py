"""Scores of `examples/stock_training.py` on the sets that ship, kept for the book.

    python tools/record_stock_training.py

Exports each set of text vectors in results/shown, and random pairs of the same number, trains on
them in processes that know nothing of mmdd, and writes examples/stock_training.json. A few minutes
on one core.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmdd.data.open import open_dataset
from mmdd.encoders import build_model
from mmdd.export import export_tensors, export_test_split
from mmdd.files import atomic_write_text, file_sha256
from mmdd.gallery import SHOWN
from mmdd.presets import preset
from mmdd.runs import initial_pairs
from mmdd.synthetic import SyntheticPairs

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "stock_training.py"
RECORD = ROOT / "examples" / "stock_training.json"
WEIGHTS = ROOT / "data" / "pretrained" / "scenes_tiny.safetensors"
PROTOCOL = "image+text_head"


def score(pairs: SyntheticPairs, test: Path, folder: Path, *options: str) -> dict[str, Any]:
    """What the example prints with --json for a set. test: as `export_test_split` writes it."""
    tensors = export_tensors(pairs, folder / "set.safetensors")
    command = [sys.executable, str(SCRIPT), str(tensors), str(test)]
    done = subprocess.run(
        [*command, "--weights", str(WEIGHTS), "--json", *options],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    rows: list[dict[str, Any]] = []
    random = preset("small", method="random", pairs=50, protocol=PROTOCOL)
    dataset = open_dataset(random.dataset, random.runtime)
    sets = {"random": (random, initial_pairs(random, dataset, build_model(random.model)))}
    for name, wishes in SHOWN.items():
        config = preset("small", **wishes)
        if config.protocol == PROTOCOL:
            loaded = SyntheticPairs.load(ROOT / "results" / "shown" / f"{name}.safetensors")
            sets[config.method] = (config, loaded)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        test = export_test_split(random, folder / "test.safetensors")
        for method, (config, pairs) in sets.items():
            for targets in ("own", "similarity")[: 1 + (pairs.similarity is not None)]:
                options = ["--one-hot"] if targets == "own" else []
                found = score(pairs, test, folder, *options)
                row = {"method": method, "pairs": len(pairs), "targets": targets}
                rows.append(row | {"run_id": config.run_id} | found)
                print(method, targets, f"{found['mean']:.2f} ± {found['std']:.2f}", flush=True)
    record = {"script_sha256": file_sha256(SCRIPT), "protocol": PROTOCOL, "sets": rows}
    atomic_write_text(RECORD, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
