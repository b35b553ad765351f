"""Measure the mechanisms that claims ask for (under a minute on one core).

python -m mmdd.claims results/mechanisms.json
"""

import argparse
import json
from pathlib import Path

import torch

from mmdd.claims.measure import MEASURES, SEEDS
from mmdd.files import atomic_write_text


def main(arguments: list[str] | None = None) -> None:
    """Measure all of them on one thread and write `load_measurements`' file."""
    parser = argparse.ArgumentParser(description="Measure the mechanisms that claims ask for.")
    parser.add_argument("file", type=Path)
    file = parser.parse_args(arguments).file
    torch.set_num_threads(1)
    values = {name: [round(v, 4) for v in measure()] for name, measure in MEASURES.items()}
    written = {"values": values, "seeds": SEEDS, "torch": torch.__version__}
    atomic_write_text(file, json.dumps(written, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
