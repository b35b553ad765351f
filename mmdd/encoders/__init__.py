"""Image and text encoders by name, and the dual encoder that a retrieval model is."""

from mmdd.encoders._weights import weights_identity
from mmdd.encoders.dual import DualEncoder, ModelConfig, build_model, code_behind, resolve_pair
from mmdd.encoders.image import ImageEncoder, ImageEncoderSpec
from mmdd.encoders.pairs import PAIRS, EncoderPair
from mmdd.encoders.text import TextEncoder, TextEncoderSpec

__all__ = [
    "PAIRS",
    "DualEncoder",
    "EncoderPair",
    "ImageEncoder",
    "ImageEncoderSpec",
    "ModelConfig",
    "TextEncoder",
    "TextEncoderSpec",
    "build_model",
    "code_behind",
    "resolve_pair",
    "weights_identity",
]
