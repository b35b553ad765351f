"""Encoder pairs by name. Adding one is an entry in `PAIRS`.

A run's identity has the name of its pair, and its source hash what the entry says.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from mmdd.encoders.image import ImageEncoderSpec
from mmdd.encoders.text import TextEncoderSpec


class EncoderPair(BaseModel):
    """An entry of `PAIRS`: which encoders, which heads, how wide the shared space is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: ImageEncoderSpec
    text: TextEncoderSpec
    dim: int
    image_head: Literal["linear", "none"] = "linear"
    text_head: Literal["linear", "mlp"] = "linear"


# The encoders of the papers.
_NFNET = ImageEncoderSpec(kind="timm", name="nfnet_l0", weights="hub", image_size=224)
_BERT = TextEncoderSpec(
    kind="huggingface", name="bert-base-uncased", weights="hub", pooling="cls", max_length=32
)


def _scenes(image: str, text: str) -> EncoderPair:
    """Two encoders of Scenes, each with its shipped weights."""

    def file(name: str) -> str:
        return f"{name.replace('-', '_')}.safetensors"

    return EncoderPair(
        image=ImageEncoderSpec(kind="scenes", name=image, weights=file(image), image_size=32),
        text=TextEncoderSpec(kind="scenes", name=text, weights=file(text)),
        dim=128,
    )


PAIRS: dict[str, EncoderPair] = {
    "scenes-tiny": _scenes("scenes-tiny", "scenes-tiny"),
    "cifar-minilm": EncoderPair(
        image=ImageEncoderSpec(
            kind="cifar_resnet",
            name="resnet20",
            weights="cifar_resnet20.safetensors",
            image_size=48,
        ),
        text=TextEncoderSpec(
            kind="huggingface",
            name="minilm",
            weights="package",
            pooling="mean",
            max_length=32,
            dropout=0.0,
        ),
        dim=128,
    ),
    "nfnet-bert": EncoderPair(image=_NFNET, text=_BERT, dim=2304),
    # The architecture of MTT-VL, TESLA, LoRS and MDM: no image projection, a residual text head.
    "nfnet-bert-lors": EncoderPair(
        image=_NFNET, text=_BERT, dim=2304, image_head="none", text_head="mlp"
    ),
}

# Other architectures for Scenes: the image encoder names the pair, and "-distil" the other text
# encoder than that of scenes-tiny.
PAIRS |= {
    f"{image}{suffix}": _scenes(image, text)
    for text, suffix in (("scenes-tiny", ""), ("scenes-distil", "-distil"))
    for image in ("scenes-tiny", "scenes-resnet", "scenes-regnet", "scenes-vit")
    if (image, text) != ("scenes-tiny", "scenes-tiny")
}
