"""Train on an exported set with plain PyTorch; nothing of mmdd is imported.

    python -m mmdd export SET set.safetensors --as tensors --test test.safetensors
    python examples/stock_training.py set.safetensors test.safetensors \\
        --weights data/pretrained/scenes_tiny.safetensors

The parts are those of any CLIP training script (open_clip's among them): a dataset of pairs, two
towers, a learned temperature, the symmetric cross-entropy, AdamW with warm-up and a cosine. The
texts are vectors of a frozen text encoder, so the text tower is one linear map. What else a set
may bring, a soft similarity between its pairs, takes the place of the one-hot targets.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class DistilledPairs(Dataset):
    """The pairs of a `--as tensors` export: (image, text vector, its number in the set)."""

    def __init__(self, path: str, one_hot: bool = False) -> None:
        tensors = load_file(path)
        self.images, self.texts = tensors["images"], tensors["texts"]
        # (N, N), or None: each text belongs to its own image alone
        self.similarity = None if one_hot else tensors.get("similarity")
        if self.texts.ndim != 2:
            raise SystemExit("this loop takes text vectors; the set has token embeddings")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.images[i], self.texts[i], i


class ScaledConv2d(nn.Conv2d):
    """NFNet's convolution: filters of zero mean and unit variance times a gain."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, stride=2, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = w.square().mean(dim=(1, 2, 3), keepdim=True)
        w = self.gain * w * torch.rsqrt(variance * w[0].numel() + 1e-6)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class ImageTower(nn.Module):
    """32 × 32 pixels in [0, 1] → d: the pretrained image encoder of Scenes and a projection."""

    def __init__(self, d: int, weights: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = ScaledConv2d(3, 32, 5), ScaledConv2d(32, 64, 3)
        self.conv3, self.linear = ScaledConv2d(64, 128, 3), nn.Linear(128 * 16, 128)
        self.register_buffer("mean", torch.zeros(128))
        self.register_buffer("deviation", torch.ones(128))
        pretrained = {
            name.removeprefix("image.").removeprefix("standardise."): value.float()
            for name, value in load_file(weights).items()
            if name.startswith("image.")
        }
        self.load_state_dict({k: v for k, v in pretrained.items() if k in self.state_dict()})
        self.head = nn.Linear(128, d, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - 0.5) / 0.25
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        return self.head((self.linear(x.flatten(1)) - self.mean) / self.deviation)


class Clip(nn.Module):
    def __init__(self, text_width: int, weights: str, d: int = 128) -> None:
        super().__init__()
        self.image, self.text = ImageTower(d, weights), nn.Linear(text_width, d, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_image, z_text = (
            F.normalize(self.image(images), dim=1),
            F.normalize(self.text(texts), dim=1),
        )
        return z_image, z_text, self.logit_scale.exp().clamp(max=100)


def clip_loss(z_image: Tensor, z_text: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Symmetric cross-entropy against targets (m, m) whose rows are scaled to sum to one."""
    logits = scale * z_image @ z_text.T
    rows, columns = target / target.sum(1, keepdim=True), target.T / target.sum(0)[:, None]
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def train(pairs: DistilledPairs, weights: str, seed: int, epochs: int, lr: float) -> Clip:
    torch.manual_seed(seed)
    model = Clip(pairs.texts.shape[1], weights)
    # Projections start from nothing and may move fast; pretrained weights should not.
    heads = [model.image.head.weight, model.text.weight]
    rest = [p for name, p in model.image.named_parameters() if not name.startswith("head")]
    optimizer = torch.optim.AdamW(
        [
            {"params": heads, "lr": 10 * lr, "weight_decay": 0.01},
            {"params": rest, "lr": lr, "weight_decay": 0.01},
            {"params": [model.logit_scale], "lr": lr, "weight_decay": 0.0},
        ]
    )
    loader = DataLoader(pairs, batch_size=128, shuffle=True)
    steps, warm_up = epochs * len(loader), max(1, epochs * len(loader) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
        ),
    )
    for _ in range(epochs):
        for images, texts, index in loader:
            z_image, z_text, scale = model(images, texts)
            target = torch.eye(len(index))
            if pairs.similarity is not None:
                target = pairs.similarity[index][:, index].clamp(min=0)
            loss = clip_loss(z_image, z_text, scale, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def recall(model: Clip, path: str) -> dict[str, float]:
    """IR@K: share of texts with their image among the K best; TR@K: of images with one of theirs.

    A wrong candidate that ties with the right one counts as ranked before it.
    """
    test = load_file(path)
    owner = test["image_of_text"]
    z_image = F.normalize(model.image(test["images"].float() / 255), dim=1)
    scores = F.normalize(model.text(test["texts"]), dim=1) @ z_image.T  # (texts, images)
    own = scores[torch.arange(len(owner)), owner]
    mine = F.one_hot(owner, scores.shape[1]).bool()
    text_rank = ((scores >= own[:, None]) & ~mine).sum(dim=1)
    best = scores.masked_fill(~mine, -math.inf).amax(dim=0)  # each image's best text of its own
    image_rank = ((scores >= best) & ~mine).sum(dim=0)
    found = {f"IR@{k}": 100 * (text_rank < k).float().mean().item() for k in (1, 5, 10)}
    found |= {f"TR@{k}": 100 * (image_rank < k).float().mean().item() for k in (1, 5, 10)}
    return found | {"mean": sum(found.values()) / 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="pairs as plain tensors (mmdd export --as tensors)")
    parser.add_argument("test", help="test split as plain tensors (mmdd export --test)")
    parser.add_argument("--weights", required=True, help="pretrained image encoder of Scenes")
    parser.add_argument("--seeds", type=int, default=5, help="models to train")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--one-hot", action="store_true", help="leave a learned similarity out")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    options = parser.parse_args()
    pairs = DistilledPairs(options.set, options.one_hot)
    found = []
    for seed in range(options.seeds):
        model = train(pairs, options.weights, seed, options.epochs, options.lr)
        found.append(recall(model, options.test))
        if not options.json:
            print(f"seed {seed}: mean recall {found[-1]['mean']:.2f}")
    means = torch.tensor([scores["mean"] for scores in found], dtype=torch.float64)
    spread = means.std().item() if len(means) > 1 else 0.0
    if options.json:
        print(json.dumps({"seeds": found, "mean": means.mean().item(), "std": spread}))
    else:
        print(
            f"{len(pairs)} pairs: mean recall {means.mean():.2f} ± {spread:.2f} (n = {len(means)})"
        )


if __name__ == "__main__":
    main()
