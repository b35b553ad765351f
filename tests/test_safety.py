"""Nothing untrusted runs, archives and downloads stay in their place, and nothing calls home.

What reads code or text here reads all that the repository tracks; the rest runs for real: a process
in a network namespace of its own, real archives, a local HTTP server (tests/data/test_download.py).
"""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(name for name in listed.splitlines() if (ROOT / name).is_file())


@functools.cache
def sources() -> dict[str, str]:
    """Everything in Python but the tests, which make the files that must not be read."""
    found = {}
    for name in tracked():
        if name.endswith(".py") and not name.startswith("tests/"):
            found[name] = (ROOT / name).read_text(encoding="utf-8")
        elif name.endswith(".ipynb"):
            for number, code in enumerate(cells(name, "code")):
                found[f"{name} code cell {number}"] = code
    return found


def cells(name: str, kind: str) -> Iterator[str]:
    for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == kind:
            yield "".join(cell["source"])


# -- code that runs what a file says ---------------------------------------------------------------

UNPICKLE = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code",
    "jsonpickle", "runpy",
}  # fmt: skip
RUN = {"eval", "exec", "compile", "__import__", "execfile"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
UNPACKERS = {"tarfile", "rarfile", "py7zr"}


def constant(node: ast.AST | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def hazards(source: str) -> list[tuple[int, str]]:
    """(line, what) for each place that could run what it reads, or unpack without looking."""
    found: list[tuple[int, str]] = []
    # Magics and shell lines of notebooks are no Python; pass instead keeps the indentation.
    tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if not all(alias.name.endswith("Error") for alias in node.names):
                modules = [node.module or ""]
            taken = {alias.name for alias in node.names}
            if (node.module == "torch" and "load" in taken) or (
                node.module == "yaml" and taken & UNSAFE_YAML
            ):
                found.append((node.lineno, f"from {node.module} import load"))
        for module in modules:
            top = module.split(".")[0]
            if top in UNPICKLE | UNPACKERS:
                found.append((node.lineno, f"import {module}"))
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        given = {word.arg: word.value for word in node.keywords}
        if isinstance(node.func, ast.Name) and called in RUN:
            found.append((node.lineno, called))
        if last == "import_module" and node.args:
            named = constant(node.args[0])
            if isinstance(named, str) and named.split(".")[0] in UNPICKLE | UNPACKERS:
                found.append((node.lineno, f"import_module({named!r})"))
        if called == "torch.load" and constant(given.get("weights_only")) is not True:
            found.append((node.lineno, "torch.load without weights_only=True"))
        if last in ("read_pickle", "to_pickle"):
            found.append((node.lineno, last))
        if "allow_pickle" in given and constant(given["allow_pickle"]) is not False:
            found.append((node.lineno, "allow_pickle"))
        if called.startswith("yaml.") and last in UNSAFE_YAML:
            found.append((node.lineno, called))
        if "trust_remote_code" in given and constant(given["trust_remote_code"]) is not False:
            found.append((node.lineno, "trust_remote_code"))
        if "shell" in given and constant(given["shell"]) is not False:
            found.append((node.lineno, "shell"))
        if called in ("os.system", "os.popen"):
            found.append((node.lineno, called))
        if last in ("extractall", "unpack_archive") or called.endswith("archive.extract"):
            found.append((node.lineno, last))
    return sorted(set(found))


def test_nothing_runs_what_it_reads() -> None:
    found = {name: hazards(code) for name, code in sources().items()}
    assert {name: places for name, places in found.items() if places} == {}
    assert len(found) > 100, "modules, tools, benchmarks, scripts of the data, cells"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import torch\ntorch.load('a')", "torch.load without weights_only=True"),
        ("import torch\ntorch.load('a', weights_only=False)", "torch.load without"),
        ("import torch\ntorch.load('a', weights_only=trusted)", "torch.load without"),
        ("from torch import load", "from torch import load"),
        ("import pickle", "import pickle"),
        ("from joblib import load", "import joblib"),
        ("import shelve as s", "import shelve"),
        ("import importlib\nimportlib.import_module('dill')", "import_module('dill')"),
        ("import numpy as np\nnp.load('a', allow_pickle=True)", "allow_pickle"),
        ("import numpy as np\nnp.load('a', allow_pickle=x)", "allow_pickle"),
        ("import pandas as pd\npd.read_pickle('a')", "read_pickle"),
        ("import yaml\nyaml.load(text)", "yaml.load"),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("import yaml\nyaml.full_load(text)", "yaml.full_load"),
        ("from yaml import unsafe_load", "from yaml import load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("__import__(name)", "__import__"),
        ("A.from_pretrained('a', trust_remote_code=True)", "trust_remote_code"),
        ("import subprocess\nsubprocess.run(text, shell=True)", "shell"),
        ("import os\nos.system(text)", "os.system"),
        ("import tarfile", "import tarfile"),
        ("import zipfile\nzipfile.ZipFile('a').extractall()", "extractall"),
        ("import shutil\nshutil.unpack_archive('a')", "unpack_archive"),
    ],
)
def test_the_search_finds_it(code: str, what: str) -> None:
    assert any(found.startswith(what) for _, found in hazards(code)), hazards(code)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('a', weights_only=True)",
        "from pickle import UnpicklingError",
        "import numpy as np\nnp.load('a')",
        "import numpy as np\nnp.load('a', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "import re\nre.compile('a')",
        "%matplotlib inline\n!ls\nx = 1",
    ],
)
def test_the_search_lets_pass_what_is_safe(code: str) -> None:
    assert hazards(code) == []


# -- the network -----------------------------------------------------------------------------------

FETCHERS = {"requests", "urllib3", "httpx", "aiohttp", "pooch", "huggingface_hub", "http", "ftplib"}
# The modules whose purpose it is, and which fetch only what is named in a call.
MAY_FETCH = {
    "mmdd/data/download.py",
    "mmdd/data/transfer.py",
    "mmdd/doctor.py",  # looks into the cache of the hub, and asks nobody
}


def fetchers(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {
        name
        for name in found
        if name.split(".")[0] in FETCHERS or name.startswith("urllib.request")
    }


def test_only_the_downloads_can_fetch() -> None:
    able = {name for name, code in sources().items() if name.startswith("mmdd/") and fetchers(code)}
    assert able == MAY_FETCH


def test_no_notebook_fetches_by_itself() -> None:
    """The set-up cell of Colab, which a reader runs there, is the one that may install."""
    found = []
    for name in tracked():
        if not name.endswith(".ipynb"):
            continue
        for code in cells(name, "code"):
            found += [f"{name}: {module}" for module in fetchers(code)]
            if code.startswith("# On Colab") and 'if "google.colab" in sys.modules' in code:
                continue
            for line in code.splitlines():
                if re.match(r"\s*[!%]\s*(wget|curl|conda|git)\b", line):
                    found.append(f"{name}: {line}")
        for text in cells(name, "markdown"):
            loads = re.findall(r"!\[[^\]]*\]\((https?:[^)]+)\)", text)
            loads += re.findall(r"<(?:img|script|iframe|link)[^>]*(https?:[^\"' >]+)", text)
            # Badges are drawn by their service, where the notebook is opened.
            badges = ("https://colab.research.google.com/", "https://mybinder.org/")
            found += [f"{name}: {load}" for load in loads if not load.startswith(badges)]
    assert found == []


QUIET = """
import importlib, json, pkgutil, sys

asked = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        target = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        if isinstance(target, (bytes, str)) and event == "socket.connect":
            return  # a socket of this machine's file system
        host = target[0] if isinstance(target, tuple) else target
        if host not in ("127.0.0.1", "::1", "localhost", b"localhost", None, ""):
            asked.append([event, repr(target)])
sys.addaudithook(watch)

import mmdd
for module in pkgutil.walk_packages(mmdd.__path__, "mmdd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from mmdd.encoders import ModelConfig, build_model
from mmdd.encoders.text import minilm_folder
from mmdd.presets import preset
from mmdd.runs import run

config = preset(
    "tiny", method="covmatch", pairs=4,
    dataset={"train": 20, "val": 8, "test": 8}, settings={"iterations": 2},
    evaluation={"students": 1, "epochs": 1}, runtime={"progress": False, "threads": 1},
)
run(config, sys.argv[1])
if minilm_folder() is not None:  # weights of a package, read by transformers
    build_model(ModelConfig(pair="cifar-minilm")).text_encoder.tokenize(["a dog"])

from huggingface_hub.utils import build_hf_headers
import socket
before = len(asked)
try:
    socket.create_connection(("192.0.2.1", 9), timeout=0.2)
except OSError as error:
    reached = type(error).__name__
else:
    reached = "an address that no one has"
agent = build_hf_headers()["user-agent"]
told = {"asked": asked[:before], "seen": asked[before:], "reached": reached, "agent": agent}
print(json.dumps(told))
"""


def test_importing_everything_and_a_run_ask_nobody(tmp_path: Path) -> None:
    """No name is looked up and nothing is connected to, and it works without any network."""
    command = [sys.executable, "-c", QUIET, str(tmp_path / "results")]
    apart = shutil.which("unshare")
    # Not everywhere may a process have a network of its own; the audit hook sees the same there.
    if apart and subprocess.run([apart, "-rn", "true"], capture_output=True).returncode == 0:
        command = [apart, "-rn", *command]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "DO_NOT_TRACK"))
    }
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MMDD_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["asked"] == []
    assert "torch" not in told["agent"], "nor would a request say what is installed here"
    assert told["seen"], "the watch sees a connection"
    assert told["reached"] != "an address that no one has"
