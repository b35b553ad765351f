"""Pretrain the encoders of `mmdd.encoders.scenes_more` and save each to a file of its own.

    python data/pretrained/make_scenes_more.py [name ...] [--folder data/pretrained]

The image encoders learn what that of scenes-tiny learned, on the same corpus by the same loop. The
text encoder is distilled from that of scenes-tiny: one layer of two, which starts as the first and
learns to give the second's token vectors and pooled vector; its embedding layer stays. No image is
ever seen together with a caption. One thread, a few minutes each; the same machine and versions
give the same bytes. Stored as float16 (the statistics of outputs and of batch norm as float32).
"""

import argparse
from pathlib import Path

import make_scenes_tiny as tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from mmdd.data.scenes import Scenes
from mmdd.encoders.image import ImageEncoder
from mmdd.encoders.scenes import WEIGHTS, ScenesTextEncoder, build_scenes_encoder
from mmdd.encoders.scenes_more import ENCODERS, ScenesDistilText

# As many as scenes-tiny's; a transformer is slower to learn where things are.
STEPS = {"scenes-resnet": 2400, "scenes-regnet": 2400, "scenes-vit": 3600, "scenes-distil": 1400}


def pretrain_image(name: str, steps: int) -> ImageEncoder:
    def make() -> ImageEncoder:
        encoder = ENCODERS["image"][name]()
        assert isinstance(encoder, ImageEncoder)
        # Only here does batch norm use, and gather, the statistics of a batch.
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        return encoder

    return tiny.pretrain_image(steps, make=make)


def distil_text(steps: int, batch: int = 128) -> ScenesTextEncoder:
    torch.manual_seed(tiny.SEED + 1)
    corpus = Scenes.generate({"pretrain": tiny.CORPUS}, size=8)  # only the captions are wanted
    teacher = build_scenes_encoder("text", "scenes-tiny", WEIGHTS, 0)
    assert isinstance(teacher, ScenesTextEncoder)
    student = ScenesDistilText()
    # The second layer's entries find no place in the student.
    found = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not found.missing_keys
    for parameter in student.input_embedding_parameters():
        parameter.requires_grad_(False)
    ids, mask = student.tokenize([text for texts in corpus.captions for text in texts])
    optimiser, schedule = tiny.one_cycle([student.bert.encoder], 2e-3, steps)
    bar = tqdm(range(steps), desc="text encoder: distillation")
    for _ in bar:
        index = torch.randint(len(ids), (batch,))
        words, attended = ids[index], mask[index]
        with torch.no_grad():
            embeddings = teacher.embed(words)
            tokens, vectors = teacher.hidden(embeddings, attended), teacher(words, attended)
        # Until the end the student has the teacher's standardisation.
        loss = F.mse_loss(student.hidden(embeddings, attended)[attended], tokens[attended])
        loss = loss + F.mse_loss(student.encode(embeddings, attended), vectors)
        tiny.step(loss, optimiser, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    nn.init.zeros_(student.standardise.mean)
    nn.init.ones_(student.standardise.deviation)
    with torch.no_grad():
        parts = zip(ids.split(1000), mask.split(1000), strict=True)
        outputs = torch.cat([student(i, m) for i, m in parts])
    tiny.set_statistics(student.standardise, outputs)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*STEPS], help=", ".join(STEPS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, help="instead of each encoder's own number")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in STEPS]
    if unknown:
        parser.error(f"no encoder is called {unknown[0]!r}: there are {', '.join(STEPS)}")
    torch.set_num_threads(1)  # another number of threads may round sums differently
    for name in arguments.names:
        steps = arguments.steps or STEPS[name]
        part: dict[str, nn.Module] = (
            {"image": pretrain_image(name, steps)}
            if name in ENCODERS["image"]
            else {"text": distil_text(steps)}
        )
        file = f"{name.replace('-', '_')}.safetensors"
        tiny.save(arguments.folder / file, part, "data/pretrained/make_scenes_more.py")


if __name__ == "__main__":
    main()
