"""Run a chapter as Colab would: in a fresh environment, from the notebook file alone.

Run as `python tools/check_setup.py [notebooks/00_start.ipynb] [-p name value ...]`. It makes a
virtual environment with a kernel and nothing else, copies the one notebook into an empty folder,
lets a module `google.colab` be loaded there, and executes the notebook from top to bottom: its
set-up cell clones the repository (the last commit of this checkout stands in for the address on
the web) and installs it with what it depends on from the package index. Some minutes, mostly torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import papermill
import yaml

ROOT = Path(__file__).resolve().parent.parent
PRESENT_ON_COLAB = ("ipykernel", "ipywidgets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", nargs="?", type=Path, default="notebooks/00_start.ipynb")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = parser.parse_args()
    parameters: dict[str, Any] = {name: yaml.safe_load(value) for name, value in given.p}
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = folder / "venv" / "bin" / "python"
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PRESENT_ON_COLAB], check=True)
        packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
        (packages / "google" / "colab").mkdir(parents=True, exist_ok=True)
        (packages / "google" / "colab" / "__init__.py").touch()

        kernel = folder / "share" / "kernels" / "colab"
        kernel.mkdir(parents=True)
        command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        command += ["--IPKernelApp.exec_lines=import google.colab"]
        spec = {"argv": command, "display_name": "Like Colab", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        os.environ |= {
            "JUPYTER_PATH": str(folder / "share"),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
            "GIT_CONFIG_VALUE_0": config["repository"]["url"],
        }
        os.environ.pop("PYTHONPATH", None)

        content = folder / "content"
        content.mkdir()
        alone = content / given.notebook.name
        shutil.copyfile(given.notebook, alone)
        papermill.execute_notebook(
            alone, folder / "out.ipynb", parameters, kernel_name="colab", cwd=content
        )
        code = "import mmdd, pathlib; print(pathlib.Path(mmdd.__file__).parent)"
        command = [str(python), "-c", code]
        where = subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True)
        if not where.stdout.startswith(str(packages)):
            sys.exit(f"the notebook used {where.stdout}, not what its set-up cell installed")
    print(f"{given.notebook} ran from its set-up cell on; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
