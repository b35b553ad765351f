"""What share of a CovMatch iteration is waiting for its data, from the image cache at 224 px.

    python benchmarks/waiting.py [--network test_nfnet] [--images 512] [--repeats 7] [--quick]

Writes JPEGs of 500 × 375 px (scenes, enlarged, with noise) to a temporary folder, prepares them
into the project's cache as a dataset is, and runs iterations of CovMatch on batches that are drawn
from it: `image+text_head`, real batches of 64 and 32 synthetic pairs, an image encoder with random
weights, texts of a small frozen encoder. Waiting is the time from asking for a batch to having it
on the device, in float32: reading rows of the memory map, the conversion, the captions' vectors.

"memory": the cache lies in the system's page cache, as it does from the second epoch on wherever
memory allows. "disk": before every iteration the system is asked to drop the file's pages, so that
each row is read again (Linux). Iterations of both take turns. "decoding" is the same batch decoded
from its JPEGs, one after the other, as a loader without a cache does in the same process. Times are
medians by the clock, for waiting is no work. Results go to waiting.json.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _measure import Timer, add, load, machine
from tqdm.auto import tqdm

RECORD = Path(__file__).with_suffix(".json")
SIZE = 224
BATCHES = (64, 32)  # real and synthetic pairs
QUICK_BATCHES = (8, 4)


def write_photos(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """`count` JPEGs of scenes, and a caption of each."""
    import numpy as np
    from PIL import Image

    from mmdd.data.scenes import Scenes

    scenes = Scenes.generate({"train": count, "val": 1, "test": 1}, size=64)
    rng = np.random.default_rng(0)
    names, captions = [], []
    for i in scenes.indices("train"):
        large = Image.fromarray(scenes.images[i]).resize((500, 375), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (375, 500, 1))
        picture = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        names.append(f"{i:06d}.jpg")
        Image.fromarray(picture).save(folder / names[-1], quality=90)
        captions.append(scenes.captions[i][0])
    return names, captions


def drop_pages(path: Path) -> None:
    """Ask the system to forget what it holds of a file in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def measure(
    network: str, images: int, batches: tuple[int, int], repeats: int, threads: int
) -> dict[str, Any]:
    """One network: seconds of iterations and of their waiting, by where the pages lie."""
    import numpy as np
    import torch

    from mmdd.batches import RealBatches, real_pairs
    from mmdd.data import PairDataset
    from mmdd.data.cache import prepare_images
    from mmdd.data.decode import decode_image
    from mmdd.distill import Context, CovMatch, CovMatchConfig
    from mmdd.encoders import ImageEncoderSpec, ModelConfig, TextEncoderSpec, build_model

    real_batch, synthetic_batch = batches
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="waiting-") as name:
        root = Path(name) / "photos"
        root.mkdir()
        names, captions = write_photos(root, images)
        prepared = prepare_images(names, root, SIZE, Path(name) / "cache", progress=False)
        dataset = PairDataset(
            prepared.images,
            [[caption] for caption in captions],
            {"train": np.arange(images)},
            name="photos",
        )
        model = build_model(
            ModelConfig(
                image=ImageEncoderSpec(kind="timm", name=network, image_size=SIZE),
                text=TextEncoderSpec(kind="scenes", name="scenes-tiny"),
            )
        )
        drawn = np.arange(synthetic_batch)
        start = real_pairs(dataset, drawn, 0 * drawn, model, "image+text_head")
        real = RealBatches(dataset, "train", model, "image+text_head", torch.device("cpu"))
        waiting = Timer()
        draw = real.draw

        def timed(*arguments: Any, **options: Any) -> Any:
            with waiting:
                return draw(*arguments, **options)

        real.draw = timed  # type: ignore[method-assign]
        method = CovMatch(
            CovMatchConfig(
                real_batch=real_batch,
                synthetic_batch=synthetic_batch,
                lr_image=1e-3,
                lr_text=1e-3,
            ),
            Context(start=start, real=real, model=model, protocol="image+text_head", seed=0),
        )

        def iterate(iteration: int) -> dict[str, float]:
            with Timer() as timer:
                method.optimizer.zero_grad(set_to_none=True)
                method.backward(iteration)
                method.optimizer.step()
                method.after_step(iteration)
            return {"waiting": waiting.seconds, "iteration": timer.seconds}

        data = prepared.path / "images.npy"
        iterate(0)
        times: dict[str, list[dict[str, float]]] = {"memory": [], "disk": []}
        decoding = []
        for repeat in tqdm(range(repeats), desc=network):
            times["memory"].append(iterate(2 * repeat + 1))
            if hasattr(os, "posix_fadvise"):
                drop_pages(data)
                times["disk"].append(iterate(2 * repeat + 2))
            some = np.random.default_rng(repeat).choice(
                images, min(real_batch, images), replace=False
            )
            with Timer() as timer:
                for i in some:
                    decode_image(root / names[i], SIZE)
            decoding.append(timer.seconds)
    modes = {
        where: {
            "seconds_waiting": round(statistics.median(t["waiting"] for t in found), 5),
            "seconds_of_an_iteration": round(statistics.median(t["iteration"] for t in found), 4),
            "share": round(statistics.median(t["waiting"] / t["iteration"] for t in found), 5),
            "raw": [[round(t["waiting"], 5), round(t["iteration"], 4)] for t in found],
        }
        for where, found in times.items()
        if found
    }
    return {"modes": modes, "seconds_decoding_a_batch": round(statistics.median(decoding), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", nargs="+", default=["test_nfnet"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="test_nfnet, few images, one iteration"
    )
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    batches = BATCHES
    if arguments.quick:
        arguments.network, arguments.images, arguments.repeats = ["test_nfnet"], 16, 1
        batches = QUICK_BATCHES
    for network in arguments.network:
        before = load()
        entry = {
            "name": network,
            "threads": arguments.threads,
            "image_size": SIZE,
            "real_batch": batches[0],
            "synthetic_batch": batches[1],
            "images": arguments.images,
            **measure(network, arguments.images, batches, arguments.repeats, arguments.threads),
            "machine": {"load_before_and_after": [before, load()], **machine("torch", "timm")},
        }
        add(entry, arguments.record)
        for where, found in entry["modes"].items():
            print(
                f"{network}, from {where}: {1e3 * found['seconds_waiting']:.1f} ms of "
                f"{found['seconds_of_an_iteration']:.2f} s, a share of {found['share']:.4f}"
            )


if __name__ == "__main__":
    main()
