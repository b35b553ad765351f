"""Measure the mechanisms that claims ask for (about a quarter of an hour on one core).

python -m mmdd.claims results/mechanisms.json
"""

import argparse
from pathlib import Path

import torch

from mmdd.claims.measurements import take_measurements


def main(arguments: list[str] | None = None) -> None:
    """Measure all of them on one thread and write `load_measurements`' file."""
    parser = argparse.ArgumentParser(description="Measure the mechanisms that claims ask for.")
    parser.add_argument("file", type=Path)
    file = parser.parse_args(arguments).file
    torch.set_num_threads(1)
    take_measurements(file)


if __name__ == "__main__":
    main()
