"""Settings that are each allowed but contradict each other, found before any work is done."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic_core import InitErrorDetails

from mmdd.mistakes import fault, suggestion

if TYPE_CHECKING:
    from mmdd.config import RunConfig


def contradictions(config: "RunConfig") -> Iterator[InitErrorDetails]:
    """One fault for each combination of a run's settings that cannot work.

    The methods check again what they are given, as they can be used without a `RunConfig`.
    """
    data = config.dataset
    if data.reader == "scenes" and data.name != "scenes":
        yield fault(
            ("dataset", "name"),
            f"dataset {data.name!r} is none that can be rendered: the only one is 'scenes'; for "
            "files on disk set dataset.reader to 'karpathy', 'coco' or 'flickr8k'"
            + suggestion(data.name, ["scenes"]),
            data.name,
        )
    if config.settings is not None:
        yield from _of_settings(config, config.settings)


def _of_settings(config: "RunConfig", settings: Any) -> Iterator[InitErrorDetails]:
    switches = [name for name in type(settings).model_fields if name.startswith("learn_")]
    learned = [getattr(settings, name) for name in switches]
    if learned and not any(learned):
        yield fault(
            ("settings", switches[0]),
            f"{config.method} has nothing to learn: set one of {', '.join(switches)}",
            False,
        )
    if getattr(settings, "engine", None) == "unroll" and settings.gradient == "detached":
        yield fault(
            ("settings", "engine"),
            "engine 'unroll' has the full gradient: for gradient 'detached' choose "
            "'double-backward', 'forward-over-reverse' or 'finite-difference'",
            "unroll",
        )
    if config.method == "repblend" and config.protocol == "both":
        yield fault(
            ("protocol",),
            "repblend follows projections of vectors, and under 'both' the texts are token "
            "embeddings: choose 'heads' or 'image+text_head'",
            "both",
        )
    experts = getattr(settings, "experts", None)
    if experts is not None and experts.snapshot_every is None:
        starts = ("max_start_epoch", "max_start_text")
        for start in [name for name in starts if hasattr(settings, name)]:
            needed = getattr(settings, start) + settings.expert_epochs
            if needed > experts.epochs:
                yield fault(
                    ("settings", start),
                    f"{start} ({getattr(settings, start)}) + expert_epochs "
                    f"({settings.expert_epochs}) is more than experts.epochs ({experts.epochs})",
                    getattr(settings, start),
                )
