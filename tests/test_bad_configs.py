"""Thousands of random mistakes in configurations: each refused, at its path, with a near match."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mmdd.config import RunConfig
from mmdd.distill import METHODS
from mmdd.encoders.pairs import PAIRS
from mmdd.presets import preset
from mmdd.selection import SELECTORS
from mmdd.store import ResultsStore

ROOT = FilePath(__file__).resolve().parents[1]
MISTAKES = 2400
Path = tuple[str, ...]

IMAGE = {"kind": "timm", "name": "resnet18", "image_size": 32}
TEXT = {"kind": "huggingface", "name": "bert", "config_overrides": {"hidden_size": 8}}


def full(config: RunConfig) -> dict[str, Any]:
    """A configuration as JSON values, with every part that may be left out put in."""
    values = config.model_dump(mode="json")
    values["student"] = copy.deepcopy(values["model"])
    for part in ("model", "student"):
        values[part] |= {"image": dict(IMAGE), "text": copy.deepcopy(TEXT)}
    return values


@pytest.fixture(scope="module")
def valid() -> list[dict[str, Any]]:
    """A valid configuration of every method there is, and one of a selection."""
    found = [full(preset("tiny", method=name, protocol="heads", pairs=8)) for name in METHODS]
    found.append(full(preset("small", method="random", init="noise", protocol="both", pairs=8)))
    for values in found:
        RunConfig.model_validate(values)
    return found


# -- what there is to get wrong --------------------------------------------------------------------


def model_of(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *get_args(annotation)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def fields(
    kind: type[BaseModel], values: dict, path: Path = ()
) -> Iterator[tuple[Path, FieldInfo]]:
    """Every field of a nested configuration that is there, with its path."""
    for name, field in kind.model_fields.items():
        yield (*path, name), field
        inside = model_of(field.annotation)
        if name == "settings" and values.get("settings") is not None:
            inside = METHODS[values["method"]].config
        if inside is not None and isinstance(values.get(name), dict):
            yield from fields(inside, values[name], (*path, name))


def at(values: dict[str, Any], path: Path) -> Any:
    for name in path:
        values = values[name]
    return values


def misspelt(word: str, rng: random.Random, taken: set[str]) -> str:
    """One slip of the keyboard: a letter doubled, lost, replaced, swapped with the next, or a case.

    Not one that makes another name of those taken.
    """
    while True:
        i = rng.randrange(len(word))
        j = min(i + 1, len(word) - 1)
        slips = [
            word[: i + 1] + word[i:],
            word[:i] + word[i + 1 :],
            word[:i] + rng.choice("qxz") + word[i + 1 :],
            word[:i] + word[j] + word[i] + word[j + 1 :],
            word.upper(),
        ]
        slip = rng.choice(slips)
        if slip not in taken and len(slip) > 1:
            return slip


def choices(path: Path, field: FieldInfo) -> list[str]:
    """The names that a field allows, if it is a choice."""
    if path == ("method",):
        return [*METHODS, *SELECTORS, "full"]
    if path == ("init",):
        return [*SELECTORS, "noise"]
    if path[-1] == "pair":
        return list(PAIRS)
    found: list[str] = []
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            found += [c for c in get_args(kind) if isinstance(c, str)]
    return found


def beyond(field: FieldInfo) -> list[Any]:
    """Numbers just and far outside a field's bounds, and those that are none."""
    found: list[Any] = []
    for bound in field.metadata:
        for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
            edge = getattr(bound, name, None)
            if isinstance(edge, int | float):
                found += [edge + step, edge + step * 1000]
    kinds = (field.annotation, *get_args(field.annotation))
    if float in kinds:
        found += [float("nan"), float("inf"), float("-inf")]
    if int in kinds and bool not in kinds:
        found += [-(10**20), 1.5, float("nan"), float("inf")]
    return found


WRONG = ([], ["a"], [1, 2], [{}], object(), {1, 2}, b"\xff")  # never right for any field


# -- mistakes: each changes the values and returns the path that the error must name, and the word -


def misspell_a_key(values: dict, rng: random.Random) -> tuple[Path, str | None]:
    path, _ = rng.choice(list(fields(RunConfig, values)))
    owner = at(values, path[:-1])
    slip = misspelt(path[-1], rng, {*owner, path[-1]})
    # Beside the right one or in its place, as both happen.
    owner[slip] = owner.get(path[-1])
    if rng.random() < 0.5:
        owner.pop(path[-1], None)
    return (*path[:-1], slip), path[-1]


def misspell_a_choice(values: dict, rng: random.Random) -> tuple[Path, str | None]:
    options = [(p, c) for p, f in fields(RunConfig, values) if (c := choices(p, f))]
    path, allowed = rng.choice(options)
    word = rng.choice(allowed)
    slip = misspelt(word, rng, set(allowed))
    at(values, path[:-1])[path[-1]] = slip
    return path, word


def wrong_type(values: dict, rng: random.Random) -> tuple[Path, str | None]:
    path, field = rng.choice(list(fields(RunConfig, values)))
    wrong = rng.choice(WRONG)
    if model_of(field.annotation) is not None and rng.random() < 0.5:
        wrong = rng.choice(["text", 3, True, 1.5])
    at(values, path[:-1])[path[-1]] = wrong
    return path, None


def out_of_range(values: dict, rng: random.Random) -> tuple[Path, str | None]:
    options = [(p, b) for p, f in fields(RunConfig, values) if (b := beyond(f))]
    path, numbers = rng.choice(options)
    at(values, path[:-1])[path[-1]] = rng.choice(numbers)
    return path, None


def contradiction(values: dict, rng: random.Random) -> tuple[Path, str | None]:
    settings = values["settings"]
    if settings is None:
        values["settings"] = {"iterations": 3}
        return ("settings",), None
    options = []
    if "learn_images" in settings:
        options.append("learn")
    if "experts" in settings and "expert_epochs" in settings:
        options.append("snapshots")
    if "engine" in settings:
        options.append("engine")
    if values["method"] == "repblend":
        options.append("protocol")
    chosen = rng.choice(options)
    if chosen == "learn":
        settings |= {name: False for name in settings if name.startswith("learn_")}
        return ("settings", "learn_images"), None
    if chosen == "snapshots":
        settings["experts"] |= {"snapshot_every": None, "epochs": 3}
        settings["max_start_epoch"] = rng.randint(3, 9)
        return ("settings", "max_start_epoch"), None
    if chosen == "engine":
        settings |= {"engine": "unroll", "gradient": "detached"}
        return ("settings", "engine"), None
    values["protocol"] = "both"
    return ("protocol",), None


KINDS = (misspell_a_key, misspell_a_choice, wrong_type, out_of_range, contradiction)


def names_it(error: ValidationError, path: Path) -> list[str]:
    """Messages at a path, or below it where the value has members of its own."""
    lines = error.errors()
    return [line["msg"] for line in lines if tuple(map(str, line["loc"]))[: len(path)] == path]


@pytest.mark.parametrize("kind", KINDS)
def test_random_mistakes(kind: Any, valid: list[dict[str, Any]]) -> None:
    rng = random.Random(kind.__name__)
    hinted = []
    for _ in range(MISTAKES // len(KINDS)):
        values = copy.deepcopy(rng.choice(valid))
        path, word = kind(values, rng)
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate(values)
        messages = names_it(caught.value, path)
        assert messages, f"{path} is not named in {caught.value}"
        if word is not None:
            told = " ".join(messages)  # a choice among two kinds has a line for each
            assert "did you mean" in told, f"{path}: {messages}"
            hinted.append(f"did you mean {word!r}" in told)
    # Of two names one slip apart (lr_image, …) the other may be as near.
    assert not hinted or sum(hinted) >= 0.95 * len(hinted)


def test_every_mistake_of_a_config_is_reported_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(
            {
                "method": "lors",
                "pairss": 3,
                "dataset": {"sise": 3},
                "init": "herdin",
                "settings": {"rnk": 3, "experts": {"cont": 2}},
                "evaluation": {"loss": "info-nce"},
            }
        )
    told = {".".join(map(str, line["loc"])): line["msg"] for line in caught.value.errors()}
    assert set(told) == {
        "pairss",
        "dataset.sise",
        "init",
        "settings.rnk",
        "settings.experts.cont",
        "evaluation.loss",
    }
    for near in ("pairs", "size", "herding", "rank", "count", "info_nce"):
        assert any(f"did you mean {near!r}?" in message for message in told.values()), near


@pytest.mark.parametrize("part", ["dataset", "model", "student", "settings", "evaluation"])
@pytest.mark.parametrize("value", [3, "text", [1], True])
def test_a_preset_with_a_value_where_a_part_belongs(part: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=part):
        preset("tiny", **{part: value})


def test_a_preset_with_a_method_that_is_no_name() -> None:
    with pytest.raises(ValidationError, match=r"method \['lors'\] is unknown"):
        preset("tiny", method=["lors"])


def test_what_is_refused_now_has_made_no_record() -> None:
    """The committed records: each configuration is valid still, and names its run."""
    count = 0
    for record in ResultsStore(ROOT / "results").records():
        assert RunConfig.model_validate(record["config"]).run_id == record["run_id"]
        count += 1
    assert count > 100


def test_a_method_with_one_start_is_told_of_that_one() -> None:
    """MTT has no `max_start_text`, which AMD has."""
    settings = {"expert_epochs": 9, "experts": {"snapshot_every": None}}
    with pytest.raises(ValidationError, match=r"max_start_epoch \(4\) \+ expert_epochs \(9\)"):
        preset("tiny", method="mtt", protocol="heads", settings=settings)
