"""Write requirements.lock: exact versions of all that the book, the tests and the extras need.

Run as `make lock` (keeps the present versions where the ranges in pyproject.toml allow them) or
`make lock UPGRADE=1` (takes the newest).

torch is pinned without a local label (`2.13.0`, not `2.13.0+cpu`), so that the same pin takes the
CPU wheel where one is offered and the CUDA wheel from the package index otherwise. That wheel pins
its own nvidia packages and triton exactly, so they are left out here: a lock that named them would
force them on machines without such a GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PIP_TOOLS = "pip-tools==7.6.2"
ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
BROUGHT_BY_TORCH = re.compile(r"^(nvidia-|cuda-|triton\b|triton==)")


def portable(compiled: str) -> str:
    """The text that pip-compile wrote, without what is true on this machine only."""
    lines = []
    for line in compiled.splitlines():
        if BROUGHT_BY_TORCH.match(line) or line.startswith("-"):
            continue
        lines.append(re.sub(r"^([A-Za-z0-9._-]+==[^\s+;]+)\+\w+", r"\1", line).rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade
    wanted = (ROOT / ".python-version").read_text().strip()
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != wanted:
        sys.exit(f"tools/lock.py must run under Python {wanted}, not {running}: use `make lock`.")
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        output = Path(folder) / "requirements.lock"
        print(f"installing {PIP_TOOLS} into a temporary environment", flush=True)
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PIP_TOOLS], check=True)
        if LOCK.exists():
            output.write_text(LOCK.read_text())  # pip-compile keeps the versions it finds here
        print("resolving pyproject.toml with all extras (a minute or two)", flush=True)
        options = ["--all-extras", "--strip-extras", "--allow-unsafe", "--no-header", "--quiet"]
        options += ["--annotation-style", "line", "--no-emit-index-url"]
        options += ["--no-emit-trusted-host", "--no-emit-find-links", "--no-emit-options"]
        options += ["--upgrade"] if upgrade else []
        command = [str(python), "-m", "piptools", "compile", *options]
        command += ["--output-file", str(output), "pyproject.toml"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"})
        header = (
            f"# Exact versions for CPython {wanted}, from the ranges in pyproject.toml.\n"
            "# Written by `make lock`; do not edit. Install with `make` or, by hand:\n"
            "#   pip install -r requirements.lock && pip install --no-deps -e .\n"
        )
        LOCK.write_text(header + portable(output.read_text()))
    pins = sum("==" in line for line in LOCK.read_text().splitlines())
    print(f"{LOCK.name}: {pins} pins")


if __name__ == "__main__":
    main()
