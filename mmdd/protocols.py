"""What is trained at evaluation, and in what form the synthetic text enters: the protocols.

Published numbers do not agree on either, so every result names its protocol.
"""

from typing import Literal

from torch import nn

from mmdd.encoders.dual import DualEncoder

Protocol = Literal["image+text_head", "both", "heads"]
PROTOCOLS: tuple[Protocol, ...] = ("image+text_head", "both", "heads")


def text_is_tokens(protocol: Protocol) -> bool:
    """True where synthetic text is token embeddings (N, L, d), False where it is vectors (N, d)."""
    return protocol == "both"


def trained_parameters(model: DualEncoder, protocol: Protocol) -> dict[str, nn.Parameter]:
    """The parameters that a protocol trains, by name.

    `image+text_head`: image encoder and projections (MTT-VL, TESLA, LoRS, MDM). `both`: both
    encoders but the text input-embedding layer, and projections (CovMatch). `heads`: projections
    only (RepBlend). Book: notebooks/02_encoders_and_evaluation.
    """
    frozen = {id(p) for p in model.text_encoder.input_embedding_parameters()}
    prefixes = {
        "image+text_head": ("image_encoder.", "image_head.", "text_head."),
        "both": ("image_encoder.", "text_encoder.", "image_head.", "text_head."),
        "heads": ("image_head.", "text_head."),
    }[protocol]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and id(parameter) not in frozen
    }


def freeze_all_but(model: DualEncoder, protocol: Protocol) -> dict[str, nn.Parameter]:
    """Ask for gradients of the trained parameters alone, and return those."""
    trained = trained_parameters(model, protocol)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def parameter_groups(
    trained: dict[str, nn.Parameter], lr_image: float, lr_text: float, lr_heads: float
) -> list[dict]:
    """Optimiser groups by part: image encoder, text encoder, projections; empty ones left out."""
    rates = {"image_encoder.": lr_image, "text_encoder.": lr_text}
    groups: dict[str, dict] = {}
    for name, parameter in trained.items():
        part = next((prefix for prefix in rates if name.startswith(prefix)), "heads.")
        lr = rates.get(part, lr_heads)
        groups.setdefault(part, {"params": [], "lr": lr})["params"].append(parameter)
    return list(groups.values())
