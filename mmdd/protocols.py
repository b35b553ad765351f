"""What is trained at evaluation, and in what form the synthetic text enters: the protocols.

Published numbers do not agree on either, so every result names its protocol.
"""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from mmdd.encoders.dual import DualEncoder
from mmdd.errors import ConfigError

Component = Literal["image_encoder", "image_head", "text_encoder", "text_head"]
COMPONENTS: tuple[Component, ...] = ("image_encoder", "image_head", "text_encoder", "text_head")
_BRANCHES = ("image", "text")
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


def by_component(trained: dict[str, nn.Parameter]) -> dict[Component, dict[str, nn.Parameter]]:
    """Trained parameters by the part of the model they belong to; parts without any left out."""
    found: dict[Component, dict[str, nn.Parameter]] = {}
    for component in COMPONENTS:
        members = {n: p for n, p in trained.items() if n.startswith(f"{component}.")}
        if members:
            found[component] = members
    return found


def component_rates(
    lr_image: float,
    lr_text: float,
    lr_heads: float,
    learned: Mapping[str, float] | None = None,
) -> dict[Component, float]:
    """The learning rate of each part of the model: those given, with learned ones put over them.

    learned: by part ("text_head"), or by branch ("image", "text") for both parts of it; a part's
    own entry wins. Raises `ConfigError` for any other name.
    """
    rates: dict[Component, float] = {
        "image_encoder": lr_image,
        "image_head": lr_heads,
        "text_encoder": lr_text,
        "text_head": lr_heads,
    }
    learned = learned or {}
    unknown = [name for name in learned if name not in (*COMPONENTS, *_BRANCHES)]
    if unknown:
        raise ConfigError(
            f"a learned rate is for {unknown[0]!r}; known: {', '.join((*COMPONENTS, *_BRANCHES))}."
        )
    for component in COMPONENTS:
        branch = component.split("_")[0]
        rates[component] = learned.get(component, learned.get(branch, rates[component]))
    return rates


def parameter_groups(
    trained: dict[str, nn.Parameter], rates: Mapping[Component, float]
) -> list[dict]:
    """Optimiser groups, one per part of the model that is trained."""
    return [
        {"params": list(members.values()), "lr": rates[component]}
        for component, members in by_component(trained).items()
    ]
