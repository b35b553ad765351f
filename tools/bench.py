"""Run benchmarks one after the other, then print the table of targets: `make bench`.

    python tools/bench.py benchmarks/growth.py benchmarks/waiting.py … [--table]

Every script writes its record to benchmarks/<name>.json. A script that fails is named at the end
and the others still run; the exit status is then 1. --table runs nothing and prints the table of
what the records say.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mmdd.targets import measured

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"


def table(folder: Path) -> str:
    """Every target beside its measured ratio, as text."""
    found = measured(folder)
    told = pd.DataFrame(
        {
            "what": found["subject"],
            "against": found["against"],
            "of": found["quantity"],
            "ratio": found["ratio"].map(lambda x: "" if pd.isna(x) else f"{x:.3f}"),
            "target": found["target"].map("<= {:.2f}".format),
            "met": found["met"],
            "machine": found["machine"],
            "load": found["load"],
        }
    )
    counts = ", ".join(f"{n} {verdict}" for verdict, n in found["met"].value_counts().items())
    lines = told.to_string(index=False, justify="left", formatters=_left(told))
    return f"{lines}\n\ntargets met: {counts}"


def _left(frame: pd.DataFrame) -> dict[str, Callable[[str], str]]:
    """Columns of text, each as wide as its longest cell."""
    widths = {str(name): max(map(len, [*frame[name], str(name)])) for name in frame.columns}
    return {name: f"{{:<{width}}}".format for name, width in widths.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the records")
    arguments = parser.parse_args()
    scripts = [] if arguments.table else arguments.scripts
    failed = []
    began = time.perf_counter()
    for number, script in enumerate(scripts, 1):
        minutes = (time.perf_counter() - began) / 60
        print(f"== {number} of {len(scripts)}, after {minutes:.1f} min: {script}", flush=True)
        if subprocess.run([sys.executable, str(script)], check=False).returncode:
            failed.append(str(script))
    if scripts:
        print(f"== {len(scripts)} scripts in {(time.perf_counter() - began) / 60:.1f} min\n")
    print(table(arguments.folder))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their rows are of an earlier run, if any")


if __name__ == "__main__":
    main()
