"""Two encoders and their projections into one space. Contains no loss."""

import json
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmdd.devices import upload
from mmdd.encoders._weights import shipped_content
from mmdd.encoders.image import ImageEncoder, ImageEncoderSpec, build_image_encoder
from mmdd.encoders.pairs import PAIRS, EncoderPair
from mmdd.encoders.scenes import scenes_module
from mmdd.encoders.text import TextEncoder, TextEncoderSpec, build_text_encoder
from mmdd.errors import ConfigError

Part = Literal["image_encoder", "text_encoder", "image_head", "text_head"]


class ModelConfig(BaseModel):
    """A pair of encoders by name, and what may differ from the pair's own entry.

    pair: a key of `PAIRS`. image_weights, text_weights: other weights than the entry's (see the
    encoder specs). dim: width d of the shared space. heads: "linear" is CovMatch's, without bias;
    "mlp" is the LoRS text head; "none" leaves the image feature as it is, and then d must be its
    width. Book: notebooks/02_encoders_and_evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pair: str = "scenes-tiny"
    image: ImageEncoderSpec | None = None
    text: TextEncoderSpec | None = None
    dim: int | None = Field(default=None, ge=1)
    image_head: Literal["linear", "none"] | None = None
    text_head: Literal["linear", "mlp"] | None = None


class MLPHead(nn.Module):
    """The LoRS text head: Linear → GELU → Linear → dropout, residual, LayerNorm.

    (m, d_in) → (m, d_out). Source: LoRS and MTT-VL, official architecture.
    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(self, d_in: int, d_out: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(d_in, d_out)
        self.second = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_out)

    def forward(self, h: Tensor) -> Tensor:
        first = self.first(h)
        return self.norm(first + self.dropout(self.second(F.gelu(first))))


class DualEncoder(nn.Module):
    """Image and text encoder with their projections into a shared space of width d.

    forward(images, texts, mask) maps pixels (B, 3, H, W) in [0, 1] and texts to (B, d) each. Texts
    are token ids (B, L) int64, token embeddings (B, L, e) that enter past the embedding table, or
    feature vectors (B, d_l) that enter past the whole text encoder.

    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        image_head: nn.Module,
        text_head: nn.Module,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.image_head = image_head
        self.text_head = text_head

    def image_features(self, images: Tensor) -> Tensor:
        """h_v: (B, 3, H, W) pixels in [0, 1] → (B, d_v), before the projection."""
        return self.image_encoder(images)

    def text_features(self, texts: Tensor, mask: Tensor | None = None) -> Tensor:
        """h_l: token ids, token embeddings or feature vectors → (B, d_l), before the projection.

        mask: (B, L) bool, true where a token counts; all of them when it is None. Raises
        `ConfigError` for a width that does not fit the encoder.
        """
        encoder = self.text_encoder
        if texts.ndim == 2 and texts.is_floating_point():
            if texts.shape[1] != encoder.dim:
                raise ConfigError(
                    f"text vectors have {texts.shape[1]} entries, this text encoder gives "
                    f"{encoder.dim}: they were made with another encoder."
                )
            return texts
        embeddings = texts if texts.is_floating_point() else encoder.embed(texts)
        if embeddings.shape[-1] != encoder.embedding_dim:
            raise ConfigError(
                f"token embeddings have {embeddings.shape[-1]} entries, this text encoder takes "
                f"{encoder.embedding_dim}: they were made with another encoder."
            )
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return encoder.encode(embeddings, mask)

    def forward(
        self, images: Tensor, texts: Tensor, mask: Tensor | None = None, normalize: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Projected features (B, d) of images and texts; L2-normalised unless told otherwise."""
        p_image = self.image_head(self.image_features(images))
        p_text = self.text_head(self.text_features(texts, mask))
        if not normalize:
            return p_image, p_text
        return F.normalize(p_image, dim=-1), F.normalize(p_text, dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """z_v: (B, d), L2-normalised."""
        return F.normalize(self.image_head(self.image_features(images)), dim=-1)

    def embed_texts(self, texts: Tensor, mask: Tensor | None = None) -> Tensor:
        """z_l: (B, d), L2-normalised."""
        return F.normalize(self.text_head(self.text_features(texts, mask)), dim=-1)

    def reset_heads(self, seed: int) -> None:
        """Draw fresh projections; the same seed gives the same numbers on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for head in (self.image_head, self.text_head):
                for module in head.modules():
                    if isinstance(module, nn.Linear | nn.LayerNorm):
                        fresh = type(module)(**_arguments(module))
                        # Not load_state_dict, at which the host would wait for a GPU.
                        with torch.no_grad():
                            for name, parameter in module.named_parameters():
                                drawn = fresh.get_parameter(name)
                                parameter.copy_(upload(drawn, parameter.device), non_blocking=True)

    def compile_encoders(self, backend: str = "inductor") -> None:
        """Have torch compile the passes of both encoders, when they are first asked for.

        backend: of `torch.compile`. A batch of another size is compiled anew. What was compiled has
        no second derivative and does not see parameters put in by `functional_call`. Results
        differ by rounding. A copy of the model is not compiled. Book: book/sweeps.
        """
        self.image_encoder.compile(backend=backend, dynamic=False)
        for part in self.text_encoder.children():
            part.compile(backend=backend, dynamic=False)


def _arguments(module: nn.Linear | nn.LayerNorm) -> dict:
    if isinstance(module, nn.Linear):
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
        }
    return {"normalized_shape": module.normalized_shape, "eps": module.eps}


def resolve_pair(config: ModelConfig) -> EncoderPair:
    """The entry of `PAIRS` with the configuration's own wishes put in.

    Raises `ConfigError` for an unknown pair, naming the known ones.
    """
    if config.pair not in PAIRS:
        raise ConfigError(f"unknown encoder pair {config.pair!r}; known: {', '.join(PAIRS)}.")
    wishes = {
        name: value
        for name in ("image", "text", "dim", "image_head", "text_head")
        if (value := getattr(config, name)) is not None
    }
    return PAIRS[config.pair].model_copy(update=wishes)


def code_behind(model: dict[str, Any]) -> tuple[list[str], str]:
    """What decides a model beyond the code that all models share: (modules, entry).

    model: a `ModelConfig` as JSON values, as records hold it. modules: those that build its
    encoders. entry: what `PAIRS` says under its name, with the content of the weights that ship.
    Both go into the source hash of what is made with the model. Raises `ConfigError` for an unknown
    pair. Book: book/sweeps.
    """
    pair = resolve_pair(ModelConfig.model_validate(model))
    modules = []
    if pair.image.kind == "scenes":
        modules.append(scenes_module("image", pair.image.name))
    if pair.text.kind == "scenes":
        modules.append(scenes_module("text", pair.text.name))
    shipped = [shipped_content(spec.weights) for spec in (pair.image, pair.text)]
    return modules, json.dumps([pair.model_dump(mode="json"), shipped])


def build_model(config: ModelConfig, seed: int = 0) -> DualEncoder:
    """Build a pair by name, with projections drawn from `seed`.

    Book: notebooks/02_encoders_and_evaluation.

    Raises `ConfigError` for an unknown pair, missing weights, or a shared width that does not fit.
    """
    pair = resolve_pair(config)
    image_encoder = build_image_encoder(pair.image)
    text_encoder = build_text_encoder(pair.text)
    if pair.image_head == "none" and pair.dim != image_encoder.dim:
        raise ConfigError(
            f"without an image projection the shared width must be the image feature's "
            f"{image_encoder.dim}, not {pair.dim}."
        )
    image_head: nn.Module = (
        nn.Identity()
        if pair.image_head == "none"
        else nn.Linear(image_encoder.dim, pair.dim, bias=False)
    )
    text_head: nn.Module = (
        MLPHead(text_encoder.dim, pair.dim)
        if pair.text_head == "mlp"
        else nn.Linear(text_encoder.dim, pair.dim, bias=False)
    )
    model = DualEncoder(image_encoder, text_encoder, image_head, text_head)
    model.reset_heads(seed)
    return model
