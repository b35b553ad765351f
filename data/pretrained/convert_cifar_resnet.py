"""Make ``cifar_resnet20.safetensors`` from the public CIFAR-10 checkpoint.

    python data/pretrained/convert_cifar_resnet.py resnet20-12fca82f.th

The checkpoint is ``pretrained_models/resnet20-12fca82f.th`` of
https://github.com/akamaster/pytorch_resnet_cifar10 (Yerlan Idelbayev, BSD-2-Clause); a float32
.safetensors file with the same names is taken as well. Convolutions and the classifier are stored
as float16, batch norm as float32. The script prints how far that moves features and logits.
"""

import argparse
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdd.encoders._weights import fit_weights, read_weights
from mmdd.encoders.image import CifarResNet
from mmdd.files import save_tensors

SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10"
DEFAULT_OUTPUT = Path(__file__).with_name("cifar_resnet20.safetensors")


def half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are stored: float16, but batch norm in float32; batch counters left out."""
    stored = {}
    for name, tensor in sorted(state.items()):
        if name.endswith("num_batches_tracked"):
            continue
        batch_norm = re.search(r"(^|\.)bn\d\.", name)
        # Running variances span many orders of magnitude, and all of batch norm is 11 kB.
        stored[name] = tensor.to(torch.float32 if batch_norm else torch.float16).contiguous()
    return stored


def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Largest feature and logit differences between two sets of tensors on 512 random images.

    Images (512, 3, 32, 32): half white noise, half smooth noise, which drives features further.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(256, 3, 32, 32, generator=generator)
    coarse = torch.rand(256, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=32, mode="bilinear", align_corners=False)
    images = torch.cat([noise, smooth])
    outputs = []
    for state in (before, after):
        network = CifarResNet("resnet20").eval()
        fit_weights(network, state, "the converted tensors", ignore=("linear.",))
        with torch.no_grad():
            features = network(images)  # (512, 64)
        weight, bias = state["linear.weight"].float(), state["linear.bias"].float()
        outputs.append((features, features @ weight.T + bias))
    (features, logits), (features_after, logits_after) = outputs
    return {
        "largest feature": features.abs().max().item(),
        "largest feature difference": (features - features_after).abs().max().item(),
        "largest logit": logits.abs().max().item(),
        "largest logit difference": (logits - logits_after).abs().max().item(),
        "classes that changed": float((logits.argmax(1) != logits_after.argmax(1)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the public CIFAR ResNet-20 checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="resnet20-12fca82f.th or float32 safetensors")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()

    original = read_weights(arguments.checkpoint)
    stored = half_precision(original)
    header = {
        "source": f"{SOURCE}, pretrained_models/resnet20-12fca82f.th",
        "author": "Yerlan Idelbayev",
        "licence": "BSD-2-Clause",
        "architecture": "CIFAR ResNet-20, He et al. 2016, section 4.2, option A",
    }
    save_tensors(arguments.output, stored, header)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes, {len(stored)} tensors")
    for what, value in compare(original, read_weights(arguments.output)).items():
        print(f"{what}: {value:.6g}")


if __name__ == "__main__":
    main()
