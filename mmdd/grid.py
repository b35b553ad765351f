"""A YAML grid of runs: products, keys that go together, exclusions and overrides, all checked."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails
from yaml.constructor import SafeConstructor

from mmdd.config import RunConfig
from mmdd.errors import ConfigError
from mmdd.mistakes import fault, faults, refuse, suggestion
from mmdd.presets import PresetName, merge, preset

_ELSEWHERE = ("sweep", "runtime")  # keys of a run that a grid has no business to set
_SCENES = 4000  # train pairs that `mmdd.data.open` renders where no number is asked for

Place = tuple[str | int, ...]  # keys and numbers that lead to a part of a sweep file


class Setting(NamedTuple):
    """A value of a point under its dotted key, and where the sweep file has it."""

    key: str
    value: Any
    place: Place


class Override(BaseModel):
    """Settings for the points that have certain values: `when` says which, `set` says what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    when: dict[str, Any]
    set: dict[str, Any]


class SweepFile(BaseModel):
    """A sweep file.

    sweep: the name that records are filed under. preset: what every point starts from. base: what
    all points share. grid: blocks; each is a product of its keys (dots go into nested settings,
    such as `settings.rho`), with a list of values or one value for each. In a block, `zip` holds
    lists of one length whose entries go together, and `exclude` points to leave out, by the values
    that they have. seeds: of every point, in place of a `seed` in each block. override: see
    `Override`; the later one wins. notebook: a chapter to execute for every point instead of a run;
    the keys of the grid are then its parameters. Book: notebooks/run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sweep: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    preset: PresetName = "small"
    base: dict[str, Any] = {}
    grid: list[dict[str, Any]] = Field(min_length=1)
    seeds: list[int] | None = Field(default=None, min_length=1)
    override: list[Override] = []
    defaults: list[Override] = []
    notebook: str | None = None


def load_sweep(path: str | Path, runtime: dict[str, Any] | None = None) -> list[RunConfig]:
    """Every point of a sweep file as a validated run, each once.

    runtime: entries of `RuntimeConfig`, which a sweep file has no business to set. Raises
    `ConfigError` naming the file, the line and the point for an unknown key, a wrong value, more
    pairs than there are scenes, an empty list, an exclusion or override that fits no point, or a
    file that is no sweep; nothing runs before all points are valid. Book: notebooks/run.
    """
    sweep, lines = read_sweep(Path(path))
    if sweep.notebook is not None:
        raise ConfigError(f"{path} executes {sweep.notebook}, which makes no records of runs.")
    for key, value in sweep.base.items():
        if isinstance(value, list):  # no setting of a run is a list
            raise lines.wrong(
                f"{key!r} is {value!r}, but base holds one value for all points: a list of values "
                "belongs in grid.",
                "base",
                key,
            )
    points: dict[str, RunConfig] = {}
    for number, settings in expand(sweep, lines):
        wishes = nested(settings, lines)
        try:
            point = _run(sweep, wishes, runtime)
        except (ValidationError, ConfigError) as error:
            raise _refusal(error, number, settings, sweep, lines) from error
        points.setdefault(point.run_id, point)
    return list(points.values())


def read_sweep(path: Path) -> tuple[SweepFile, "Lines"]:
    """A sweep file as it stands, and where in it things stand. Raises `ConfigError`."""
    try:
        lines = Lines(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError as error:
        near = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(
            f"{path} is not a sweep file: it does not exist{suggestion(path, near)}"
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a sweep file: {told}") from error
    if not isinstance(lines.values, dict):
        raise ConfigError(f"{path} is not a sweep file: it is no mapping of keys to values.")
    try:
        return SweepFile.model_validate(lines.values), lines
    except ValidationError as error:
        whole = ValidationError.from_exception_data(path.name, faults(SweepFile, error))
        told = _by_line(whole, lambda loc: lines.of(*loc))
        raise ConfigError(f"{path}, {told}") from error


def expand(sweep: SweepFile, lines: "Lines") -> list[tuple[int, list[Setting]]]:
    """(number of its block, its settings) of every point.

    A later setting of a key wins: first the base, then defaults, the block, overrides. Raises
    `ConfigError` for what `load_sweep` says of blocks.
    """
    base = _settings(sweep.base, "base")
    _check_keys(base, lines)
    found = [
        (number, point)
        for number, block in enumerate(sweep.grid)
        for point in _product(base, number, block, sweep.seeds, lines)
    ]
    for part, rules in (("defaults", sweep.defaults), ("override", sweep.override)):
        for number, rule in enumerate(rules):
            given = _settings(rule.set, part, number, "set")
            _check_keys(given, lines)
            fitting = [point for _, point in found if _fits(point, rule.when)]
            if not fitting:
                message = f"no point has {_told(rule.when)}: nothing to set there."
                raise lines.wrong(message, part, number, "when")
            for point in fitting:
                at = len(base) if part == "defaults" else len(point)
                point[at:at] = given
    return found


def nested(settings: list[Setting], lines: "Lines") -> dict[str, Any]:
    """Settings put into nested dicts, the later ones over the earlier.

    Raises `ConfigError` for a key below something that is no dict.
    """
    values: dict[str, Any] = {}
    for key, value, place in settings:
        try:
            _put(values, key, value)
        except ConfigError as error:
            raise lines.wrong(error, *place) from error
    return values


def values_of(point: list[Setting], base: bool = True) -> dict[str, Any]:
    """What a point has, by dotted key. base: whether to tell what all points share."""
    return {key: value for key, value, place in point if base or place[0] != "base"}


def _run(
    sweep: SweepFile, wishes: dict[str, Any], runtime: dict[str, Any] | None = None
) -> RunConfig:
    wishes = wishes | {"sweep": sweep.sweep, "runtime": runtime or {}}
    try:
        run = preset(sweep.preset, **wishes)
    except (TypeError, AttributeError) as error:  # it looks into some values unchecked
        with suppress(TypeError, AttributeError):
            RunConfig.model_validate(wishes)
        raise ConfigError(f"a value has the wrong form ({error})") from error
    refuse(RunConfig, list(_beyond_the_data(run)))
    return run


def _beyond_the_data(run: RunConfig) -> Iterator[InitErrorDetails]:
    """More pairs than there are to choose from, where that is known without reading files.

    Not for `RunConfig` to refuse: one that only scores a set has the usual number, unused.
    """
    data = run.dataset
    if data.reader == "scenes" and run.method != "full":
        there = _SCENES if data.train is None else data.train
        if run.pairs > there:
            message = f"cannot choose {run.pairs} pairs: the train split of {data.name!r} has "
            yield fault(("pairs",), f"{message}{there}", run.pairs)


def _settings(values: dict[str, Any], *place: str | int) -> list[Setting]:
    return [Setting(key, value, (*place, key)) for key, value in values.items()]


def _axis(setting: Setting) -> list[Setting]:
    """What a key of a block has in turn: the entries of its list, or its one value."""
    key, values, place = setting
    if not isinstance(values, list):
        return [setting]
    return [Setting(key, value, (*place, number)) for number, value in enumerate(values)]


def _check_keys(settings: list[Setting], lines: "Lines") -> None:
    for key, _, place in settings:
        if not isinstance(key, str):
            raise lines.wrong(f"{key!r} is no name of a setting.", *place)
        if key.split(".")[0] in _ELSEWHERE:
            raise lines.wrong(
                f"{key!r} is no matter of base or grid: `sweep` stands at the top of the file, the "
                "runtime on the command line.",
                *place,
            )


def _written_twice(node: yaml.Node | None) -> tuple[str, int] | None:
    """A key that a mapping has twice, of which YAML would silently take the last, and its line."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                return name, key.start_mark.line + 1
            seen.add(name)
            found = _written_twice(value)
            if found is not None:
                return found
    elif isinstance(node, yaml.SequenceNode):
        return next(filter(None, map(_written_twice, node.value)), None)
    return None


def _product(
    base: list[Setting],
    number: int,
    block: dict[str, Any],
    seeds: list[int] | None,
    lines: "Lines",
) -> list[list[Setting]]:
    """The points of one block, each with the base, for all of the file's seeds."""
    here = ("grid", number)
    block = dict(block)
    together, left_out = block.pop("zip", {}), block.pop("exclude", [])
    for key, value, kind in (("zip", together, dict), ("exclude", left_out, list)):
        if not isinstance(value, kind):
            message = "zip is a mapping of lists, and exclude a list of mappings."
            raise lines.wrong(message, *here, key)
    beside, zipped = _settings(block, *here), _settings(together, *here, "zip")
    _check_keys([*beside, *zipped], lines)
    for key, value, place in [*beside, *zipped]:
        if key == "seed" and seeds is not None:
            raise lines.wrong("the file has seeds for every block, and this one too.", *place)
        if place[2] == "zip" and key in block:
            raise lines.wrong(f"{key!r} is both in zip and beside it.", *place)
        if value == []:
            raise lines.wrong(f"{key!r} has no value, nothing to run.", *place)
    columns = [_axis(setting) for setting in zipped]
    if len({len(column) for column in columns}) > 1:
        told = ", ".join(f"{column[0].key} has {len(column)}" for column in columns)
        raise lines.wrong(f"what is zipped has one length; {told}.", *here, "zip")
    rows = list(zip(*columns, strict=True)) or [()]
    points = [
        [*base, *point, *row] for point in itertools.product(*map(_axis, beside)) for row in rows
    ]
    if seeds is not None:
        each = _axis(Setting("seed", seeds, ("seeds",)))
        points = [[*point, seed] for seed in each for point in points]
    for i, rule in enumerate(left_out):
        if not isinstance(rule, dict):
            raise lines.wrong(f"{rule!r} is no mapping of keys to values.", *here, "exclude", i)
        kept = [point for point in points if not _fits(point, rule)]
        if len(kept) == len(points):
            raise lines.wrong(f"no point has {_told(rule)} to exclude.", *here, "exclude", i)
        points = kept
    if not points:
        raise lines.wrong("everything is excluded, nothing to run.", *here, "exclude")
    return points


def _fits(point: list[Setting], rule: dict[str, Any]) -> bool:
    """True where the point has the rule's values; a list stands for any of its entries."""
    has = values_of(point)
    return all(
        key in has and has[key] in (values if isinstance(values, list) else [values])
        for key, values in rule.items()
    )


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


class Lines:
    """The values of a sweep file, and the lines where they stand, counted from 1."""

    def __init__(self, text: str, path: str | Path = "") -> None:
        self.path = path
        self.root = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = _written_twice(self.root)
        if twice is not None:
            raise ConfigError(f"{path}, line {twice[1]}: {twice[0]!r} is there twice in a mapping.")
        # This also puts what `<<` names into the nodes, before their own keys.
        self.values = None if self.root is None else SafeConstructor().construct_document(self.root)

    def find(self, *place: str | int) -> int | None:
        """The line of what keys and numbers lead to, if it is there."""
        node, line = self.root, 1 if self.root is None else self.root.start_mark.line + 1
        for step in place:
            if isinstance(node, yaml.SequenceNode) and step in range(len(node.value)):
                node = node.value[step]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                found = [(k, v) for k, v in node.value if k.value == str(step)]
                if not found:
                    return None
                key, node = found[-1]
                line = key.start_mark.line + 1
            else:
                return None
        return int(line)

    def of(self, *place: str | int) -> int:
        """The line of what keys and numbers lead to, or of the last of them that is there."""
        found = self.find(*place)
        return self.of(*place[:-1]) if found is None else found

    def wrong(self, message: object, *place: str | int) -> ConfigError:
        """An error that names the line of a place."""
        return ConfigError(f"{self.path}, line {self.of(*place)}: {message}")


def _refusal(
    error: ValidationError | ConfigError,
    number: int,
    settings: list[Setting],
    sweep: SweepFile,
    lines: Lines,
) -> ConfigError:
    """What to say of a point that is no run: lines, values, complaints. number: of its block."""
    own = _told(values_of(settings, base=False))
    point = f" ({own})" if own else ""

    def line_of(loc: Place) -> int:
        place = _place_of(loc, settings, lines) or _guilty(settings, sweep, lines)
        return lines.of(*(place or ("grid", number)))

    if isinstance(error, ValidationError):
        return ConfigError(f"{lines.path}, {_by_line(error, line_of, point)}")
    return ConfigError(f"{lines.path}, line {line_of(())}{point}: {error}")


def _place_of(loc: Place, settings: list[Setting], lines: Lines) -> Place | None:
    """Where the file has what a validation error is about: the place that won."""
    for key, _, place in reversed(settings):
        at = tuple(key.split("."))
        if loc and at[: len(loc)] == loc:
            return place
        inside = (*place, *loc[len(at) :])
        if at == loc[: len(at)] and lines.find(*inside) is not None:
            return inside
    return None


def _guilty(settings: list[Setting], sweep: SweepFile, lines: Lines) -> Place | None:
    """Where the value stands without which the point would be valid, the latest if several."""
    for i in reversed(range(len(settings))):
        with suppress(ValidationError, ConfigError):
            _run(sweep, nested(settings[:i] + settings[i + 1 :], lines))
            return settings[i].place
    return None


def _by_line(error: ValidationError, line_of: Callable[[Place], int], point: str = "") -> str:
    """What pydantic complains of, each with its line."""
    found: dict[int, list[str]] = {}
    for line in error.errors():
        found.setdefault(line_of(line["loc"]), []).append(_explained(line))
    return "; ".join(f"line {line}{point}: {'; '.join(told)}" for line, told in found.items())


def explain(error: ValidationError) -> str:
    """What pydantic complains of, on one line."""
    return "; ".join(map(_explained, error.errors()))


def _explained(line: Any) -> str:
    inner = line.get("ctx", {}).get("error")  # of a validator, such as that of the settings
    if isinstance(inner, ValidationError):
        why = explain(inner)
    else:
        why = line["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, [".".join(map(str, line["loc"])), why]))


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys put into nested dicts, without touching the values given.

    Raises `ConfigError` for a key below something that is no dict.
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        _put(nested, key, value)
    return nested


def _put(target: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        below = target.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{dotted!r} cannot be set: {parent!r} is {below!r}, not a mapping.")
        target = below
    old = target.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        value = merge(old, value)
    target[last] = deepcopy(value)
