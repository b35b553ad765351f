"""What a run is: one validated configuration, refused when a key or value makes no sense."""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

from mmdd.combinations import contradictions
from mmdd.distill import METHODS, Method
from mmdd.distill.loop import Precision
from mmdd.encoders import ModelConfig, code_behind, weights_identity
from mmdd.encoders.pairs import PAIRS
from mmdd.errors import ConfigError
from mmdd.evaluation import EvaluationConfig
from mmdd.mistakes import fault, faults, not_finite, refuse, suggestion
from mmdd.protocols import Protocol
from mmdd.provenance import source_hash
from mmdd.selection import SELECTORS, SelectionConfig
from mmdd.selection.noise import noise_like

# Generators of torch take no more, once a run has added its own offsets.
MAX_SEED = 2**62


class DatasetConfig(BaseModel):
    """Which pairs: the embedded Scenes, or files on disk read by a reader.

    reader: "scenes" renders; "karpathy", "coco" and "flickr8k" read `RuntimeConfig.data`. size:
    pixels a side. train, val, test: numbers of scenes, or for a reader the largest number of
    images to take from each split (None takes all). seed: of the rendering.
    Book: notebooks/01_data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "scenes"
    reader: Literal["scenes", "karpathy", "coco", "flickr8k"] = "scenes"
    size: int = Field(default=32, ge=8)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    train: int | None = Field(default=None, ge=2)
    val: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class RuntimeConfig(BaseModel):
    """Where and how a run is carried out; none of it belongs to the run's identity.

    device: "auto" takes a GPU if there is one. data: folder of the dataset's files. experts: folder
    of the expert buffers that runs share, by default in the cache. checkpoint_every: iterations
    between checkpoints. redo_stale: a finished record that other code made counts as missing.
    compile: have `torch.compile` make the encoders' passes of the distillation faster, for methods
    that allow it; the others refuse. It changes rounding, so a record says so beside its costs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    data: str | None = None
    experts: str | None = None
    checkpoint_every: int = Field(default=50, ge=1)
    progress: bool = True
    on_error: Literal["raise", "drop"] = "raise"
    redo_stale: bool = False
    compile: bool = False


class RunConfig(BaseModel):
    """One run: a dataset, a model, a method at a budget, an evaluation protocol, a seed.

    method: a name in `mmdd.distill.METHODS`, a selection, or "full" (train on the whole train
    split, `pairs` is ignored). init: the selection that a distillation starts from, or "noise".
    settings: the method's own configuration. selection: how selections are computed, where one that
    goes by features is the method or the start. student: encoders of the students, where they are
    others than those of the distillation; selected real pairs then go through those. sweep: the
    group that the record is filed under; it and `runtime` are not part of the run's identity.
    precision: of the distillation: "float32" is exact on every device, "bfloat16" (of forward
    passes) is meant for a GPU, "tf32" (of products of float32 numbers) for NVIDIA's alone. Students
    are trained with the loss that the set was distilled with, where the method's settings name one
    and `evaluation` does not.

    Unknown keys, impossible values and contradictions are refused by one `ValidationError`, which
    names the path of each and, where a name is misspelt, the nearest that there is.

    Book: notebooks/run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "covmatch"
    pairs: int = Field(default=100, ge=1)
    protocol: Protocol = "both"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    init: str = "random"
    precision: Precision = "float32"
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    student: ModelConfig | None = None
    settings: SerializeAsAny[BaseModel] | None = None
    selection: SelectionConfig = SelectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: str = Field(default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _all_faults(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Every fault at once, each at its whole path and with what was probably meant."""
        found: list[InitErrorDetails] = []
        if isinstance(values, dict):
            values, found = _filled_in(values)
        try:
            made = handler(values)
        except ValidationError as error:
            found += faults(cls, error)
        refuse(cls, found)
        found += not_finite(made.model_dump())
        for part in ("model", "student"):
            model: ModelConfig | None = getattr(made, part)
            if model is not None and model.pair not in PAIRS:
                found.append(_unknown((part, "pair"), "encoder pair", model.pair, list(PAIRS)))
        refuse(cls, [*found, *contradictions(made)])
        return made

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        dumped = self.model_dump(mode="json", exclude={"sweep", "runtime"})
        if self.method == "full":
            dumped.pop("pairs")
        if self.method not in METHODS:
            dumped.pop("init")
        if dumped["precision"] == "float32":
            dumped.pop("precision")  # records from before there was a choice keep their ids
        if self.student is None:
            dumped.pop("student")
        if self.method == "full" or self.selector in ("random", "noise"):
            dumped.pop("selection")
        for model in (dumped["model"], dumped.get("student", {})):
            for side in ("image", "text"):
                if model.get(side) is not None:
                    model[side]["weights"] = weights_identity(model[side]["weights"])
        return dumped

    @property
    def selector(self) -> str:
        """What makes the real pairs that are evaluated or that a distillation starts from."""
        return self.init if self.method in METHODS else self.method

    @property
    def source_hash(self) -> str:
        """12 hex digits of the code that decides this run's result."""
        return code_of(self.identity())

    @property
    def run_id(self) -> str:
        """16 hex digits naming the run: a hash of `identity()`."""
        return _digest(self.identity())

    @property
    def set_id(self) -> str:
        """16 hex digits naming the set alone: runs that differ in the evaluation share it."""
        return _digest(self._identity_of_set())

    @property
    def set_source_hash(self) -> str:
        """12 hex digits of the code that decides the set alone, whoever is trained on it."""
        return code_of(self._identity_of_set())

    def _identity_of_set(self) -> dict[str, Any]:
        # A selection goes by the encoders of its students, a distilled set does not.
        left_out = {"evaluation", "student"} if self.method in METHODS else {"evaluation"}
        return {k: v for k, v in self.identity().items() if k not in left_out}


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _filled_in(values: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """The values with the method's settings validated, and what is wrong with those and names."""
    values, found = dict(values), []
    known, starts = [*METHODS, *SELECTORS, "full"], [*SELECTORS, "noise"]
    for key, allowed in (("method", known), ("init", starts)):
        if key in values and values[key] not in allowed:
            found.append(_unknown((key,), key, values.pop(key), allowed))
            if key == "method":
                values.pop("settings", None)  # of a method that nobody knows
    method, settings = values.get("method", "covmatch"), values.get("settings")
    if method not in METHODS:
        if settings:
            message = f"method {method!r} has no settings, but some were given"
            found.append(fault(("settings",), message, settings))
            values.pop("settings")
        return values, found
    kind = METHODS[method].config
    if not isinstance(settings, kind):
        dumped = settings.model_dump() if isinstance(settings, BaseModel) else settings
        try:
            settings = values["settings"] = kind.model_validate({} if dumped is None else dumped)
        except ValidationError as error:
            found += faults(kind, error, ("settings",))
            values.pop("settings")
            return values, found
    if hasattr(settings, "loss"):
        values["evaluation"] = _with_loss(values.get("evaluation"), settings.loss)
    return values, found


def _unknown(path: tuple[str, ...], what: str, given: Any, known: list[str]) -> InitErrorDetails:
    message = f"{what} {given!r} is unknown; known: {', '.join(known)}"
    return fault(path, message + suggestion(given, known), given)


def _with_loss(evaluation: Any, loss: str) -> Any:
    """The students' configuration with a loss put in, where it names none itself."""
    if isinstance(evaluation, EvaluationConfig):
        if "loss" in evaluation.model_fields_set:
            return evaluation
        return evaluation.model_copy(update={"loss": loss})
    if evaluation is None or isinstance(evaluation, dict):
        return {"loss": loss} | (evaluation or {})
    return evaluation  # refused where it is validated


def code_of(identity: dict[str, Any]) -> str:
    """12 hex digits of the code that a run with this `RunConfig.identity` would use today.

    That is the code that all runs share, and the modules of the run's method, selection and
    encoders. Raises `ConfigError` where this version lacks one of them.
    """
    method, start = identity["method"], identity.get("init", "random")
    selectors = [] if method == "full" else [start if method in METHODS else method]
    modules = [METHODS[method].distiller.__module__] if method in METHODS else []
    for name in selectors:
        if name == "noise":
            modules += [noise_like.__module__, SELECTORS["random"].__module__]
        elif name in SELECTORS:
            modules.append(SELECTORS[name].__module__)
        else:
            raise ConfigError(f"no method or start {name!r} here.")
    entries = []
    for model in (identity["model"], identity.get("student")):
        if model is not None:
            more, entry = code_behind(model)
            modules += more
            entries.append(entry)
    return source_hash(*modules, entries=tuple(entries))


def is_stale(record: dict[str, Any]) -> bool:
    """True where other code made a record than a run of it would use now."""
    try:
        today = code_of(record["config"])
    except (ConfigError, ValidationError):
        return True  # a method, or an encoder pair, that this version does not have
    return bool(record["environment"]["source_hash"] != today)


def method_entry(config: RunConfig) -> Method:
    """The registry entry of a distillation run. Raises `ConfigError` for a selection."""
    if config.method not in METHODS:
        raise ConfigError(f"{config.method!r} selects pairs, it does not distil.")
    return METHODS[config.method]
