"""Measure distilled and selected sets for the gallery: data/measured/sets.json.

Make the sets (finished runs whose set was deleted need another results folder), then measure them:

for grid in scenes_covmatch scenes_mdm scenes_peers scenes_selection beyond budgets; do
    python -m mmdd sweep sweeps/$grid.yaml --results out
done
python tools/measure_sets.py out/*/sets

What was measured before of a set that is not there stays, where its run and code are today's.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mmdd.config import RunConfig
from mmdd.data.open import open_dataset
from mmdd.encoders import build_model
from mmdd.files import atomic_write_text
from mmdd.gallery import captions_of, measure, start_of, trained_reference
from mmdd.presets import preset
from mmdd.synthetic import SyntheticPairs

TARGET = Path(__file__).resolve().parents[1] / "data" / "measured" / "sets.json"
COMMAND = "python tools/measure_sets.py out/*/sets"
SEEDS = (0, 1, 2)
SELECTIONS = (
    "random",
    "herding",
    "k-center",
    "k-means",
    "k-means-text",
    "forgetting",
    "clip-filter",
)
DISTILLED = (
    *("covmatch", "mdm", "mtt", "lors", "repblend", "amd"),
    *("moments", "moment-trajectory"),
)


def wanted() -> Iterable[RunConfig]:
    """The sets of fifty pairs (49 beside a similarity) that the gallery compares."""
    for seed in SEEDS:
        for method in (*SELECTIONS, *DISTILLED):
            yield preset(
                "small",
                method=method,
                pairs=49 if method in ("lors", "repblend", "amd") else 50,
                protocol="image+text_head",
                seed=seed,
                **({"init": "random"} if method == "mdm" else {}),
            )
        yield preset("small", method="covmatch", pairs=50, protocol="both", seed=seed)


def find(folders: list[Path], config: RunConfig) -> SyntheticPairs | None:
    """The set of a run as today's code makes it, or None."""
    for folder in folders:
        path = folder / f"{config.set_id}.safetensors"
        if path.exists():
            pairs = SyntheticPairs.load(path)
            if pairs.metadata["source_hash"] == config.set_source_hash:
                return pairs
    return None


def main(folders: list[Path]) -> None:
    torch.set_num_threads(1)
    first = next(iter(wanted()))
    dataset = open_dataset(first.dataset, first.runtime)
    model = build_model(first.model)
    captions = captions_of(dataset, model)
    reference = trained_reference(dataset, build_model(first.model))
    before = {}
    if TARGET.exists():
        old = json.loads(TARGET.read_text())
        if old["dataset"] == dataset.fingerprint:
            before = {(row["set_id"], row["source_hash"]): row for row in old["sets"]}
    rows: list[dict[str, Any]] = []
    for config in wanted():
        about = {"method": config.method, "pairs": config.pairs, "protocol": config.protocol}
        about |= {"seed": config.seed}
        pairs = find(folders, config)
        if pairs is None:
            kept = before.get((config.set_id, config.set_source_hash))
            print("as before:" if kept else "not found:", about, config.set_id)
            rows += [kept] if kept else []
            continue
        start = start_of(pairs, dataset, model)
        numbers = measure(pairs, start, captions, model, reference)
        row = about | {"set_id": config.set_id, "source_hash": config.set_source_hash}
        row["measures"] = {name: round(value, 5) for name, value in numbers.items()}
        if config.method in SELECTIONS and config.seed == SEEDS[0]:
            for key in ("source_images", "source_captions"):
                row[key] = pairs.metadata[key]
        rows.append(row)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"command": COMMAND, "dataset": dataset.fingerprint})[:-1]
    atomic_write_text(TARGET, f'{head},\n "sets": [\n  {lines}\n ]}}\n')
    print(f"{len(rows)} sets measured: {TARGET.name}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
