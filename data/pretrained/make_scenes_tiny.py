"""Pretrain the two encoders of `scenes-tiny` on Scenes' pretraining corpus and save them.

    python data/pretrained/make_scenes_tiny.py [--output data/pretrained/scenes_tiny.safetensors]

The image encoder learns to name attributes, the text encoder to fill in masked words and to recall
the words of a caption. Neither ever sees an image together with a caption. One thread, about two
minutes; the same machine and versions give the same bytes. Weights are stored as float16 (the
output statistics as float32).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmdd.data.scenes import COLOURS, HUES, PATTERNS, SHAPES, SIZES, TEXTURES, Scene, Scenes
from mmdd.encoders.image import ImageEncoder
from mmdd.encoders.scenes import ScenesImageEncoder, ScenesTextEncoder
from mmdd.files import save_tensors, tensors_sha256

CORPUS = 6000
SEED = 0


def attributes(scene: Scene) -> set[str]:
    """The labels that hold in a scene: single attributes and pairs of one object's attributes."""
    found = {f"background {scene.hue}", f"background {scene.pattern}"}
    for item in scene.objects:
        cell = f"cell {item.cell}"
        found |= {item.shape, item.colour}
        found |= {f"{item.shape} {other}" for other in (item.colour, item.texture, item.size, cell)}
        found.add(f"{item.colour} {cell}")
    return found


def label_names() -> list[str]:
    cells = [f"cell {(row, column)}" for row in (0, 1) for column in (0, 1)]
    names = [*SHAPES, *COLOURS, *(f"background {b}" for b in (*HUES, *PATTERNS))]
    for others in (COLOURS, TEXTURES, SIZES, cells):
        names += [f"{shape} {other}" for shape in SHAPES for other in others]
    return names + [f"{colour} {cell}" for colour in COLOURS for cell in cells]


def pretrain_image(
    steps: int, batch: int = 64, make: Callable[[], ImageEncoder] = ScenesImageEncoder
) -> ImageEncoder:
    """Train what `make` builds, in the mode that it comes in, to name the attributes of a scene."""
    torch.manual_seed(SEED)
    corpus = Scenes.generate({"pretrain": CORPUS})
    column = {name: i for i, name in enumerate(label_names())}
    labels = torch.zeros(CORPUS, len(column))
    for row, scene in enumerate(Scenes.describe("pretrain", CORPUS)):
        labels[row, [column[name] for name in attributes(scene)]] = 1
    images = torch.from_numpy(corpus.images).permute(0, 3, 1, 2)

    encoder = make()
    head = nn.Linear(encoder.dim, len(column))
    optimiser, schedule = one_cycle([encoder, head], 2e-3, steps)
    bar = tqdm(range(steps), desc="image encoder: attributes")
    for _ in bar:
        index = torch.randint(CORPUS, (batch,))
        logits = head(F.silu(encoder(images[index].float() / 255)))
        loss = F.binary_cross_entropy_with_logits(logits, labels[index])
        step(loss, optimiser, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    encoder.eval()
    with torch.no_grad():
        outputs = torch.cat([encoder(block.float() / 255) for block in images.split(500)])
    set_statistics(encoder.standardise, outputs)
    return encoder


def pretrain_text(steps: int, batch: int = 128) -> ScenesTextEncoder:
    torch.manual_seed(SEED + 1)
    corpus = Scenes.generate({"pretrain": CORPUS}, size=8)  # only the captions are wanted
    encoder = ScenesTextEncoder()
    ids, mask = encoder.tokenize([text for texts in corpus.captions for text in texts])
    size = len(encoder.words)
    fill_in, recall = nn.Linear(64, size), nn.Linear(64, size)
    optimiser, schedule = one_cycle([encoder, fill_in, recall], 2e-3, steps)
    bar = tqdm(range(steps), desc="text encoder: masked words")
    for _ in bar:
        index = torch.randint(len(ids), (batch,))
        words, attended = ids[index], mask[index]
        hide = (torch.rand(words.shape) < 0.2) & attended & (words != encoder.words["[CLS]"])
        hidden_words = words.masked_fill(hide, encoder.words["[MASK]"])
        tokens = encoder.hidden(encoder.embed(hidden_words), attended)
        loss = F.cross_entropy(fill_in(tokens[hide]), words[hide])
        bag = torch.zeros(batch, size).scatter_(1, words, 1.0)
        pooled = encoder.encode(encoder.embed(words), attended)
        loss = loss + 10 * F.binary_cross_entropy_with_logits(
            recall(pooled)[:, len(encoder.specials) :], bag[:, len(encoder.specials) :]
        )
        step(loss, optimiser, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        parts = zip(ids.split(1000), mask.split(1000), strict=True)
        outputs = torch.cat([encoder.encode(encoder.embed(i), m) for i, m in parts])
    set_statistics(encoder.standardise, outputs)
    return encoder


def one_cycle(
    modules: list[nn.Module], peak: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = [p for module in modules for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=peak)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps)


def step(
    loss: Tensor, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()


def set_statistics(layer: nn.Module, outputs: Tensor) -> None:
    """Fix the standardisation to the corpus' mean and deviation (identity until now)."""
    layer.mean.copy_(outputs.mean(dim=0))
    layer.deviation.copy_(outputs.std(dim=0) + 1e-3)


def half(name: str, tensor: Tensor) -> Tensor:
    statistics = "standardise" in name or "running_" in name
    return tensor if statistics or not tensor.is_floating_point() else tensor.half()


def save(output: Path, parts: dict[str, nn.Module], made_by: str) -> None:
    """Write the encoders of a file, each under its part's name, with their hash in the header."""
    tensors = {
        f"{part}.{name}": half(name, tensor)
        for part, encoder in parts.items()
        for name, tensor in encoder.state_dict().items()
    }
    header = {"made_by": made_by, "sha256": tensors_sha256(tensors)}
    save_tensors(output, tensors, header)
    size = output.stat().st_size
    print(f"{output}: {size:,} bytes, tensors' sha256 {header['sha256']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent / "scenes_tiny.safetensors"
    parser.add_argument("--output", type=Path, default=here)
    parser.add_argument("--image-steps", type=int, default=2400)
    parser.add_argument("--text-steps", type=int, default=1400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # another number of threads may round sums differently
    parts = {
        "image": pretrain_image(arguments.image_steps),
        "text": pretrain_text(arguments.text_steps),
    }
    save(arguments.output, parts, "data/pretrained/make_scenes_tiny.py")


if __name__ == "__main__":
    main()
