"""A YAML grid of runs: products, keys that go together, exclusions and overrides, all checked."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmdd.config import RunConfig
from mmdd.errors import ConfigError
from mmdd.mistakes import faults, suggestion
from mmdd.presets import merge, preset

_ELSEWHERE = ("sweep", "runtime")  # keys of a run that a grid has no business to set


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
    preset: str = "small"
    base: dict[str, Any] = {}
    grid: list[dict[str, Any]] = Field(min_length=1)
    seeds: list[int] | None = Field(default=None, min_length=1)
    override: list[Override] = []
    defaults: list[Override] = []
    notebook: str | None = None


def load_sweep(path: str | Path, runtime: dict[str, Any] | None = None) -> list[RunConfig]:
    """Every point of a sweep file as a validated run, each once.

    runtime: entries of `RuntimeConfig`, which a sweep file has no business to set. Raises
    `ConfigError` naming the file, the line and the point for an unknown key, a wrong value, an
    empty list, an exclusion or override that fits no point, or a file that is no sweep; nothing
    runs before all points are valid. Book: notebooks/run.
    """
    path = Path(path)
    sweep, lines = read_sweep(path)
    if sweep.notebook is not None:
        raise ConfigError(f"{path} executes {sweep.notebook}, which makes no records of runs.")
    for key, value in sweep.base.items():
        if isinstance(value, list):  # no setting of a run is a list
            raise ConfigError(
                f"{path}, line {lines.of('base', key)}: {key!r} is {value!r}, but base holds one "
                "value for all points: a list of values belongs in grid."
            )
    points: dict[str, RunConfig] = {}
    try:
        base = nest(sweep.base)
    except ConfigError as error:
        raise ConfigError(f"{path}, line {lines.of('base')}: {error}") from error
    for number, chosen in expand(path, sweep, lines):
        wishes = deepcopy(base)
        for key, value in chosen.items():
            try:
                _put(wishes, key, value)
            except ConfigError as error:
                where = f"{path}, line {lines.of('grid', number, key)}"
                raise ConfigError(f"{where}: {error}") from error
        wishes |= {"sweep": sweep.sweep, "runtime": runtime or {}}
        try:
            point = preset(sweep.preset, **wishes)
            found = point.run_id
        except (ValidationError, ConfigError, TypeError, AttributeError) as error:
            line = _guilty_line(error, number, chosen, sweep, lines)
            described = ", ".join(f"{k}={v}" for k, v in chosen.items())
            why: object = error
            if isinstance(error, ValidationError):
                why = explain(error)
            elif not isinstance(error, ConfigError):  # a value where a mapping belongs, or so
                why = f"a value has the wrong form ({error})"
            raise ConfigError(f"{path}, line {line} ({described}): {why}") from error
        points.setdefault(found, point)
    return list(points.values())


def read_sweep(path: Path) -> tuple[SweepFile, "Lines"]:
    """A sweep file as it stands, and where in it things stand. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
        sweep, lines = SweepFile.model_validate(yaml.safe_load(text)), Lines(text)
        twice = _written_twice(lines.root)
        if twice is not None:
            raise ConfigError(f"{path}, line {twice[1]}: {twice[0]!r} is there twice in a mapping.")
    except ValidationError as error:
        told = ValidationError.from_exception_data(path.name, faults(SweepFile, error))
        raise ConfigError(f"{path} is not a sweep file: {explain(told)}.") from error
    except FileNotFoundError as error:
        near = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(
            f"{path} is not a sweep file: it does not exist{suggestion(path, near)}"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a sweep file: {error}") from error
    return sweep, lines


def expand(path: Path, sweep: SweepFile, lines: "Lines") -> list[tuple[int, dict[str, Any]]]:
    """(number of its block, values by dotted key) of every point, overrides put in.

    Raises `ConfigError` for what `load_sweep` says of blocks.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    for number, block in enumerate(sweep.grid):
        here = f"{path}, line {lines.of('grid', number)}"
        together = block.get("zip", {})
        keys = [*block, *(together if isinstance(together, dict) else ())]
        _check_keys(here, [*sweep.base, *keys])
        if sweep.seeds is not None and "seed" in keys:
            raise ConfigError(f"{here}: the file has seeds for every block, and this one too.")
        points = _product(path, number, block, sweep, lines)
        found += [(number, point) for point in points]
    for part, number, given in [
        *(("defaults", i, given) for i, given in enumerate(sweep.defaults)),
        *(("override", i, given) for i, given in enumerate(sweep.override)),
    ]:
        where = f"{path}, line {lines.of(part, number)}"
        _check_keys(where, list(given.set))
        fitting = [p for _, p in found if _fits(sweep.base | p, given.when)]
        if not fitting:
            raise ConfigError(f"{where}: no point has {_told(given.when)}: nothing to set there.")
        for point in fitting:
            if part == "defaults":
                own = dict(point)
                point.clear()
                point |= given.set | own  # what comes later wins
                continue
            for key, value in given.set.items():
                old = point.pop(key, None)  # what comes later wins, so it goes to the end
                both = isinstance(old, dict) and isinstance(value, dict)
                point[key] = merge(old, value) if both else value
    return found


def _check_keys(where: str, keys: list[Any]) -> None:
    odd = [key for key in keys if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"{where}: {odd[0]!r} is no name of a setting.")
    taken = [key for key in keys if key.split(".")[0] in _ELSEWHERE]
    if taken:
        raise ConfigError(
            f"{where}: {taken[0]!r} is no matter of base or grid: `sweep` stands at the top of the "
            "file, the runtime on the command line."
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
    path: Path, number: int, block: dict[str, Any], sweep: SweepFile, lines: "Lines"
) -> list[dict[str, Any]]:
    """The points of one block, those of the file's seeds included."""
    here = f"{path}, line {lines.of('grid', number)}"
    block = dict(block)
    together, left_out = block.pop("zip", {}), block.pop("exclude", [])
    if not isinstance(together, dict) or not isinstance(left_out, list):
        raise ConfigError(f"{here}: zip is a mapping of lists, and exclude a list of mappings.")
    axes = {key: value if isinstance(value, list) else [value] for key, value in block.items()}
    twice = [key for key in together if key in axes]
    if twice:
        line = lines.of("grid", number, "zip")
        raise ConfigError(f"{path}, line {line}: {twice[0]!r} is both in zip and beside it.")
    empty = [key for key, values in (axes | together).items() if values == []]
    if empty:
        line = lines.of("grid", number, empty[0])
        raise ConfigError(f"{path}, line {line}: {empty[0]!r} has no value, nothing to run.")
    rows: list[dict[str, Any]] = [{}]
    if together:
        lengths = {k: len(v) if isinstance(v, list) else 1 for k, v in together.items()}
        if len(set(lengths.values())) > 1:
            line = lines.of("grid", number, "zip")
            told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise ConfigError(f"{path}, line {line}: what is zipped has one length; {told}.")
        lists = [v if isinstance(v, list) else [v] for v in together.values()]
        rows = [dict(zip(together, row, strict=True)) for row in zip(*lists, strict=True)]
    points = [
        dict(zip(axes, values, strict=True)) | row
        for values in itertools.product(*axes.values())
        for row in rows
    ]
    if sweep.seeds is not None:
        points = [point | {"seed": seed} for seed in sweep.seeds for point in points]
    for rule in left_out:
        line = lines.of("grid", number, "exclude")
        if not isinstance(rule, dict):
            raise ConfigError(f"{path}, line {line}: {rule!r} is no mapping of keys to values.")
        kept = [point for point in points if not _fits(sweep.base | point, rule)]
        if len(kept) == len(points):
            raise ConfigError(f"{path}, line {line}: no point has {_told(rule)} to exclude.")
        points = kept
    if not points:
        raise ConfigError(f"{here}: everything is excluded, nothing to run.")
    return points


def _fits(point: dict[str, Any], rule: dict[str, Any]) -> bool:
    """True where the point has the rule's values; a list stands for any of its entries."""
    return all(
        key in point and point[key] in (values if isinstance(values, list) else [values])
        for key, values in rule.items()
    )


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


class Lines:
    """Where in a YAML text its parts stand, counted from 1."""

    def __init__(self, text: str) -> None:
        self.root = yaml.compose(text)

    def of(self, *path: str | int) -> int:
        """The line of what keys and numbers lead to, or of the last of them that is there."""
        node, line = self.root, 1
        for step in path:
            if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                found = [(k, v) for k, v in node.value if k.value == step]
                if not found:
                    break
                line = found[0][0].start_mark.line + 1
                node = found[0][1]
            else:
                break
        return int(line)


def _guilty_line(
    error: Exception, number: int, chosen: dict[str, Any], sweep: SweepFile, lines: Lines
) -> int:
    """The line of the key that a validation error is about, or that of its block."""
    for complaint in _complaints(error):
        for key in chosen:
            if key == complaint or key.endswith(f".{complaint}") or complaint.startswith(f"{key}."):
                return lines.of("grid", number, key)
        for key in sweep.base:
            if key == complaint or complaint.startswith(f"{key}."):
                return lines.of("base", key)
    return lines.of("grid", number)


def _complaints(error: Exception) -> list[str]:
    """Dotted names of what a validation error complains of, inner errors included."""
    if not isinstance(error, ValidationError):
        return []
    found = []
    for fault in error.errors():
        inner = fault.get("ctx", {}).get("error")
        found += _complaints(inner) if isinstance(inner, ValidationError) else []
        found.append(".".join(map(str, fault["loc"])))
    return [name for name in found if name]


def explain(error: ValidationError) -> str:
    """What pydantic complains of, on one line."""
    found = []
    for fault in error.errors():
        inner = fault.get("ctx", {}).get("error")  # of a validator, such as that of the settings
        why = (
            explain(inner)
            if isinstance(inner, ValidationError)
            else fault["msg"].removeprefix("Value error, ")
        )
        found.append(": ".join(filter(None, [".".join(map(str, fault["loc"])), why])))
    return "; ".join(found)


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
