"""Grids become points, all of them checked and each once, before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdd.config import DatasetConfig, RuntimeConfig
from mmdd.data.open import open_dataset
from mmdd.distill import METHODS, CovMatchConfig
from mmdd.errors import ConfigError
from mmdd.grid import _SCENES, Lines, expand, load_sweep, nest, read_sweep, values_of
from mmdd.presets import preset
from mmdd.selection import SELECTORS

ROOT = Path(__file__).parents[1]
KNOWN = ", ".join([*METHODS, *SELECTORS, "full"])


def write(path: Path, **values: Any) -> Path:
    path.write_text(
        yaml.safe_dump({"sweep": "mine", "preset": "tiny"} | values, sort_keys=False),
        encoding="utf-8",
    )
    return path


def test_a_grid_is_a_product(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        base={"seed": 3, "evaluation": {"epochs": 7}},
        grid=[
            {"method": "covmatch", "settings.rho": [1, 2], "pairs": [10, 20]},
            {"method": ["random", "full"], "evaluation.lr_image": 0.5},
        ],
    )
    points = load_sweep(path, {"threads": 2})
    found = [
        (p.method, p.pairs, p.settings.rho if isinstance(p.settings, CovMatchConfig) else None)
        for p in points
    ]
    assert found == [
        ("covmatch", 10, 1.0),
        ("covmatch", 20, 1.0),
        ("covmatch", 10, 2.0),
        ("covmatch", 20, 2.0),
        ("random", 100, None),
        ("full", 100, None),
    ]
    assert all(p.seed == 3 and p.sweep == "mine" and p.runtime.threads == 2 for p in points)
    assert [p.evaluation.epochs for p in points] == [7] * 6
    usual = preset("tiny").evaluation.lr_image
    assert [p.evaluation.lr_image for p in points] == [usual] * 4 + [0.5] * 2
    # What the file does not say is the preset's.
    assert points[4].run_id == preset(
        "tiny", method="random", seed=3, evaluation={"epochs": 7, "lr_image": 0.5}
    ).run_id  # fmt: skip


def test_a_point_comes_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        grid=[
            {"method": ["random", "full"], "pairs": [10, 20]},  # pairs do not matter to "full"
            {"method": "random", "pairs": [10, 10]},
        ],
    )
    assert [(p.method, p.pairs) for p in load_sweep(path)] == [
        ("random", 10),
        ("random", 20),
        ("full", 10),
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"grid": [{"method": "random"}, {"pears": 3}]}, r"line 5 \(pears=3\): pears: Extra"),
        ({"grid": [{"pairs": [10, 0]}]}, r"line 6 \(pairs=0\): pairs: "),
        ({"grid": [{"method": "dm", "pairs": 0}]}, r"line 5 \(method=dm, pairs=0\): pairs: "),
        ({"grid": [{"settings.rhoo": 1}]}, r"line 4 \(settings\.rhoo=1\): settings\.rhoo: Ex"),
        ({"base": {"evaluation": {"epoch": 1}}, "grid": [{}]}, r"line 5: evaluation\.epoch: Ex"),
        ({"grid": [{"method": "covmach"}]}, f"line 4 .*'covmach' is unknown; known: {KNOWN}"),
        ({"grid": [{"method": "random", "settings.rho": 1}]}, "line 5 .*'random' has no settings"),
        ({"grid": [{"method": "full", "pairs": []}]}, "line 5: 'pairs' has no value"),
        ({"grid": [{"pairs": 3}], "preset": "huge"}, "line 2: preset: Input should be 'tiny', "),
        ({"grid": [{"seed.x": 3}], "base": {"seed": 1}}, r"line 4: 'seed\.x' cannot be set"),
        ({"grid": [{"settings.rho": 1}], "base": {"settings": None}}, "'settings' is None"),
        ({"grid": [{"runtime.threads": 4}]}, r"line 4: 'runtime\.threads' is no matter of"),
        ({"grid": [{"pairs": 3}], "base": {"runtime": {}}}, "line 6: 'runtime' is no matter of"),
        ({"grid": [{"sweep": "other"}]}, "line 4: 'sweep' is no matter of"),
        ({"grid": [{"pairs": 3}], "sweep": "../x"}, "line 1: sweep: "),
        ({"grid": [{"zip": {"pairs": [1, 2], "seed": [1]}}]}, "line 4: .*pairs has 2, seed has 1"),
        ({"grid": [{"zip": {"pairs": []}}]}, "line 5: 'pairs' has no value"),
        ({"grid": [{"zip": [1]}]}, "line 4: zip is a mapping of lists"),
        ({"grid": [{"exclude": {"pairs": 3}}]}, "exclude a list of mappings"),
        ({"grid": [{"pairs": 3, "exclude": [3]}]}, "line 6: 3 is no mapping"),
        ({"grid": [{"pairs": 3, "exclude": [{"pairs": 4}]}]}, "line 6: no point has pairs=4"),
        ({"grid": [{"pairs": 3, "exclude": [{"pairs": 3}]}]}, "line 5: everything is excluded"),
        ({"grid": [{"pairs": 3, "seed": 1}], "seeds": [0]}, "line 5: the file has seeds"),
        ({"grid": [{"zip": {"seed": [1]}}], "seeds": [0]}, "line 5: the file has seeds"),
        ({"grid": [{"pairs": 3, "zip": {"pairs": [4]}}]}, "line 6: 'pairs' is both in zip"),
        ({"grid": [{"zip": {"runtime.threads": [4]}}]}, r"line 5: 'runtime\.threads' is no matter"),
        ({"grid": [{"zip": {1: [4]}}]}, "line 5: 1 is no name of a setting"),
        (
            {"grid": [{"pairs": 3}], "override": [{"when": {"pairs": 3}, "set": {"sweep": "x"}}]},
            "line 9: 'sweep' is no matter of",
        ),
        ({"grid": [{"method": "lors", "evaluation": 3}]}, "line 5 .*evaluation: Input"),
        ({"grid": [{"student": "scenes-tiny"}]}, "line 4 .*student=scenes-tiny"),
        ({"grid": [{"model": "scenes-tiny"}]}, "line 4 .*model=scenes-tiny"),
        ({"grid": [{"method": [["random"]]}]}, r"line 5 .*method \['random'\] is un"),
        ({"base": {"protocol": ["both"]}, "grid": [{}]}, r"'protocol' is \['both'\].*in grid"),
        ({"base": {"model.pair": ["a"]}, "grid": [{}]}, r"line 4: 'model\.pair' is .*in grid"),
        ({"base": {"model": {"pair": ["a"]}}, "grid": [{}]}, "line 5: model.pair: Input should"),
        ({"grid": [{"protocol": [["both"]]}]}, "line 5 .*protocol: Input should be"),
        ({"base": {"name": "x"}, "grid": [{"pairs": 3}]}, "line 4 .*name: Extra inputs"),
        ({"base": {"seed": 1, "seed.x": 2}, "grid": [{"pairs": 3}]}, "line 5: 'seed.x' cannot be"),
        ({"grid": [{"pairs": 3}], "seeds": []}, "line 5: seeds: "),
        (
            {"grid": [{"pairs": 3}], "override": [{"when": {"pairs": 4}, "set": {"seed": 1}}]},
            "line 6: no point has pairs=4: nothing to set there",
        ),
        (
            {"grid": [{"pairs": 3}], "defaults": [{"when": {"pairs": 4}, "set": {"seed": 1}}]},
            "line 6: no point has pairs=4: nothing to set there",
        ),
        ({"grid": [{"pairs": 3}], "override": [{"when": {}}]}, r"override\.0\.set: Field required"),
        ({"grid": [{"pairs": 3}], "notebook": "x.ipynb"}, "x.ipynb, which makes no records"),
        ({"grid": []}, "line 3: grid: "),
        ({"grid": {"pairs": 3}}, "line 3: grid: "),
        ({"grid": [{"pairs": 3}], "gird": 1}, "line 5: gird: .*mean 'grid'"),
        ({}, "line 1: grid: Field required"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_named(tmp_path: Path, values: dict, named: str) -> None:
    path = write(tmp_path / "wrong.yaml", **values)
    with pytest.raises(ConfigError, match=rf"wrong\.yaml.*{named}") as error:
        load_sweep(path)
    assert "\n" not in str(error.value)


# What is wrong in a file stands in its last line but for what follows the `#!`.
GUILTY = {
    "an unknown key at the top": ("gridd: 1  #!\ngrid: [{pairs: 3}]", "gridd: .* mean 'grid'"),
    "no block": ("grid: []  #!", "grid: List should have at least 1"),
    "a block that is none": ("grid:\n  - pairs: 3\n  - null  #!", r"grid\.1: Input should be"),
    "no seed": ("seeds: []  #!\ngrid:\n  - pairs: 3", "seeds: List should have at least 1"),
    "a name": ("grid:\n  - pairs: 3\nsweep: ../x  #!", "sweep: String should match"),
    "a preset": ("preset: smal  #!\ngrid:\n  - pairs: 3", "preset: .*did you mean 'small'"),
    "an empty list": (
        "grid:\n  - pairs: 3\n  - method: random\n    pairs: []  #!",
        "'pairs' has no value, nothing to run",
    ),
    "an override's value": (
        "grid:\n  - method: random\n    pairs: [50]\n"
        "override:\n  - when: {method: random}\n    set:\n      seed: 1\n      pairs: -1  #!",
        r"method=random, pairs=-1, seed=1\): pairs: ",
    ),
    "an override's key": (
        "grid:\n  - settings.rho: [1, 2]\n    pairs: [50]\n"
        "override:\n  - when: {pairs: 50}\n    set:\n      settings.rhoo: 1  #!",
        r"settings\.rhoo: Extra .* mean 'rho'",
    ),
    "a key deep in an override": (
        "grid:\n  - settings: {rho: 1}\n    pairs: [50]\n"
        "override:\n  - when: {pairs: 50}\n    set:\n      settings:\n        lambda_: 0.5\n"
        "        rhoo: 1  #!",
        r"settings\.rhoo: Extra .* mean 'rho'",
    ),
    "an override's key below a value": (
        "grid:\n  - pairs: 50\noverride:\n  - when: {pairs: 50}\n    set: {pairs.x: 1}  #!",
        r"'pairs\.x' cannot be set",
    ),
    "a default's value": (
        "grid:\n  - pairs: [50]\n"
        "defaults:\n  - when: {pairs: 50}\n    set:\n      settings.rho: high  #!",
        r"settings\.rho: Input should be a valid number",
    ),
    "a value that a default had right": (
        "grid:\n  - pairs: 50\n    settings.rho: high  #!\n"
        "defaults:\n  - when: {pairs: 50}\n    set: {settings.rho: 1}",
        r"settings\.rho: Input should be a valid number",
    ),
    "what fits no point": (
        "grid:\n  - pairs: 50\noverride:\n  - set: {seed: 1}\n    when: {pairs: 5}  #!",
        "no point has pairs=5",
    ),
    "a value deep in the base": (
        "base:\n  protocol: heads\n  evaluation:\n    students: 2\n    epochs: -1  #!\n"
        "grid:\n  - pairs: 3",
        r"evaluation\.epochs: ",
    ),
    "a key of the base": (
        "base:\n  protocol: heads\n  evaluations: {}  #!\ngrid:\n  - pairs: 3",
        "evaluations: Extra .* mean 'evaluation'",
    ),
    "a value in a zip": (
        "grid:\n  - pairs: 3\n    zip:\n      seed: [0, 1]\n      settings.rho:\n        - 1\n"
        "        - high  #!",
        r"seed=1, settings\.rho=high\): settings\.rho: ",
    ),
    "a key in a zip": (
        "grid:\n  - pairs: 3\n    zip:\n      seed: [0, 1]\n      sed: [0, 1]  #!",
        "sed: Extra .* mean 'seed'",
    ),
    "a mapping in a list": (
        "grid:\n  - settings:\n      - {rho: 1}\n      - {rho: 2,\n         rhoo: 3}  #!",
        r"settings\.rhoo: Extra",
    ),
    "a seed": ("seeds:\n  - 0\n  - -1  #!\ngrid:\n  - pairs: 3", r"seed=-1\): seed: "),
    "a seed that is no number": (
        "seeds:\n  - 0\n  - one  #!\ngrid:\n  - pairs: 3",
        r"seeds\.1: Input should be a valid integer",
    ),
    "what an anchor shares": (
        "grid:\n  - &one\n    seed: 1\n    pairs: 0  #!\n"
        "    exclude: [{pairs: 0, method: random}]\n    method: [random, dm]\n"
        "  - {<<: *one, seed: 2}",
        r"seed=1, pairs=0, method=dm\): pairs: ",
    ),
    "what stands over an anchor": (
        "grid:\n  - &one\n    pairs: 3\n    seed: 1\n  - <<: *one\n    pairs: 0  #!",
        r"pairs=0.*: pairs: ",
    ),
    "more pairs than scenes": (
        "preset: small\ngrid:\n  - method: [random, full]\n    pairs: [4000,\n      4001]  #!",
        "pairs: cannot choose 4001 pairs: the train split of 'scenes' has 4000",
    ),
    "more pairs than some scenes": (
        "base: {dataset.train: 40, method: random}\ngrid:\n  - pairs: [40, 41]  #!",
        "cannot choose 41 pairs: the train split of 'scenes' has 40",
    ),
    "fewer scenes than the usual pairs": (
        "grid:\n  - method: random\n    seed: [0, 1]\n    dataset.train: 99  #!",
        "cannot choose 100 pairs: the train split of 'scenes' has 99",
    ),
    # Each is allowed, and the file does not name what the complaint is about.
    "a contradiction": (
        "grid:\n  - method: repblend\n    protocol: heads\n    pairs: 9\n"
        "override:\n  - when: {pairs: 9}\n    set:\n      seed: 1\n"
        "      settings.experts.snapshot_every: null  #!",
        r"settings\.max_start_epoch: .* is more than",
    ),
    "a number in quotes": (
        "preset: paper\ngrid:\n  - method: random\n    pairs: '3'  #!",
        "a value has the wrong form",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "named"), GUILTY.values(), ids=GUILTY)
def test_the_guilty_line_is_named(tmp_path: Path, text: str, named: str) -> None:
    head = "".join(
        f"{line}\n" for line in ("sweep: mine", "preset: tiny") if line.split(":")[0] not in text
    )
    (tmp_path / "wrong.yaml").write_text(head + text)
    (number,) = (i for i, line in enumerate((head + text).splitlines(), 1) if "#!" in line)
    with pytest.raises(ConfigError, match=rf"wrong\.yaml, line {number}( \(|:).*{named}") as error:
        load_sweep(tmp_path / "wrong.yaml")
    assert "\n" not in str(error.value)


def test_every_fault_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("sweep: s\nbase:\n  seed: -1\n  init: x\ngrid:\n  - pairs: 0\n    inits: y\n")
    with pytest.raises(ConfigError) as error:
        load_sweep(path)
    told = str(error.value)
    for line, key in ((3, "seed"), (4, "init"), (6, "pairs"), (7, "inits")):
        assert f"line {line} (pairs=0, inits=y): {key}: " in told


def test_photos_may_have_any_number_of_pairs(tmp_path: Path) -> None:
    """How many there are is known once they are read, and who takes all of them chooses none."""
    photos = write(tmp_path / "p.yaml", preset="photos", grid=[{"method": "random", "pairs": 9999}])
    assert [point.pairs for point in load_sweep(photos)] == [9999]
    everything = write(tmp_path / "f.yaml", grid=[{"method": "full", "dataset.train": 40}])
    assert len(load_sweep(everything)) == 1


def test_the_usual_number_of_scenes() -> None:
    scenes = open_dataset(DatasetConfig(size=8), RuntimeConfig())
    assert len(scenes.indices("train")) == _SCENES


@pytest.mark.parametrize(
    "content", ["grid: [", "[1, 2]", "", "a: b: c", "\xff\xfe", "a: &b [*b]", "a: 2000-99-99"]
)
def test_a_file_that_is_no_sweep(tmp_path: Path, content: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"wrong\.yaml is not a sweep file"):
        load_sweep(path)
    with pytest.raises(ConfigError, match="none"):
        load_sweep(tmp_path / "none.yaml")


def test_a_dict_in_a_block_is_put_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "sweep: merged\npreset: tiny\nbase: {method: random, evaluation: {students: 3}}\n"
        "grid: [{evaluation: {epochs: 7}, pairs: 5}]\n"
    )
    (point,) = load_sweep(path)
    assert (point.evaluation.students, point.evaluation.epochs) == (3, 7)


def test_nest() -> None:
    shared = {"b": [1]}
    nested = nest({"a.b.c": 1, "a.d": shared, "e": 2})
    assert nested == {"a": {"b": {"c": 1}, "d": {"b": [1]}}, "e": 2}
    nested["a"]["d"]["b"].append(2)
    assert shared == {"b": [1]}
    assert nest({"a": {"b": 1}, "a.c": 2}) == {"a": {"b": 1, "c": 2}}
    with pytest.raises(ConfigError, match=r"'a\.b' cannot be set: 'a' is 1"):
        nest({"a": 1, "a.b": 2})


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_of_the_project(path: Path) -> None:
    points = load_sweep(path)
    assert points
    # Hyphens and underscores aside, records are filed under the file's own name.
    assert {p.sweep.replace("-", "_") for p in points} == {path.stem.replace("-", "_")}


def test_zipped_keys_go_together(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        grid=[{"pairs": [10, 20], "zip": {"settings.rho": [1, 2], "settings.lambda_": [0.5, 0.1]}}],
    )
    found = [(p.pairs, p.settings.rho, p.settings.lambda_) for p in load_sweep(path)]  # type: ignore[union-attr]
    assert found == [(10, 1, 0.5), (10, 2, 0.1), (20, 1, 0.5), (20, 2, 0.1)]


def test_excluded_points_are_left_out(tmp_path: Path) -> None:
    rules = [{"method": "random", "pairs": [20, 30]}, {"seed": 1, "pairs": 10}]
    path = write(
        tmp_path / "s.yaml",
        grid=[
            {"method": ["random", "dm"], "pairs": [10, 20, 30], "seed": [0, 1], "exclude": rules}
        ],
    )
    found = [(p.method, p.pairs, p.seed) for p in load_sweep(path)]
    assert found == [
        ("random", 10, 0),
        ("dm", 10, 0),
        ("dm", 20, 0),
        ("dm", 20, 1),
        ("dm", 30, 0),
        ("dm", 30, 1),
    ]


def test_exclusions_see_what_is_shared(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        base={"method": "random"},
        seeds=[0, 1],
        grid=[{"pairs": [5, 6], "exclude": [{"method": "random", "pairs": 5, "seed": 1}]}],
    )
    found = [(p.pairs, p.seed) for p in load_sweep(path)]
    assert found == [(5, 0), (6, 0), (6, 1)]


def test_an_override_goes_over_everything(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        grid=[{"method": "covmatch", "settings": {"lambda_": 0.3}, "settings.rho": [1, 2]}],
        override=[{"when": {"method": "covmatch"}, "set": {"settings": {"rho": 5}}}],
    )
    (point,) = load_sweep(path)  # both have ρ = 5 now, and a point comes once
    assert point.settings.rho == 5  # type: ignore[union-attr]
    assert point.settings.lambda_ == 0.3  # type: ignore[union-attr]


def test_a_default_gives_way_to_what_a_block_says(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        base={"method": "covmatch", "evaluation.epochs": 7},
        grid=[{"pairs": 3}, {"pairs": 4, "settings.rho": [1, 2]}, {"pairs": 5, "method": "random"}],
        defaults=[
            {"when": {"method": "covmatch"}, "set": {"settings.rho": 5, "evaluation.epochs": 6}},
            {"when": {"method": "covmatch", "pairs": 4}, "set": {"seed": 8}},
        ],
        override=[{"when": {"pairs": 3}, "set": {"seed": 9}}],
    )
    points = load_sweep(path)
    assert [(p.pairs, p.seed) for p in points] == [(3, 9), (4, 8), (4, 8), (5, 0)]
    rhos = [p.settings.rho for p in points[:3]]  # type: ignore[union-attr]
    assert rhos == [5, 1, 2]
    # It goes over the base, which all points share, and over the preset.
    assert [p.evaluation.epochs for p in points] == [6, 6, 6, 7]


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("sweep: s\npreset: tiny\ngrid:\n  - pairs: 3\n    pairs: [4]\n")
    with pytest.raises(ConfigError, match="line 5: 'pairs' is there twice"):
        load_sweep(path)


def test_seeds_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        base={"protocol": "both"},
        grid=[{"method": "covmatch", "pairs": [10, 20]}, {"method": "random", "pairs": 10}],
        seeds=[3, 4],
        override=[
            {"when": {"method": "covmatch"}, "set": {"settings.rho": 3, "settings.lambda_": 0.7}},
            {"when": {"protocol": "both", "pairs": 20}, "set": {"settings.rho": 4}},
        ],
    )
    points = load_sweep(path)
    assert [(p.method, p.pairs, p.seed) for p in points] == [
        ("covmatch", 10, 3),
        ("covmatch", 20, 3),
        ("covmatch", 10, 4),
        ("covmatch", 20, 4),
        ("random", 10, 3),
        ("random", 10, 4),
    ]
    rhos = [p.settings.rho for p in points[:4]]  # type: ignore[union-attr]
    assert rhos == [3, 4, 3, 4]
    assert points[1].settings.lambda_ == 0.7  # type: ignore[union-attr]


def test_a_grid_of_a_chapter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml", notebook="x.ipynb", base={"a": 1}, grid=[{"b": [1, 2]}], seeds=[0, 1]
    )
    sweep, lines = read_sweep(path)
    points = [point for _, point in expand(sweep, lines)]
    assert [values_of(point) for point in points] == [
        {"a": 1, "b": 1, "seed": 0},
        {"a": 1, "b": 2, "seed": 0},
        {"a": 1, "b": 1, "seed": 1},
        {"a": 1, "b": 2, "seed": 1},
    ]
    assert values_of(points[3], base=False) == {"b": 2, "seed": 1}
    assert [setting.place for setting in points[3]] == [
        ("base", "a"),
        ("grid", 0, "b", 1),
        ("seeds", 1),
    ]


def test_lines() -> None:
    lines = Lines("a: 1\n# a remark\ngrid:\n  - x: 1\n    y: [1,\n        2]\n  - {z: 3}\n")
    assert lines.of("a") == 1
    assert lines.of("grid") == 3
    assert lines.of("grid", 0, "y") == 5
    assert lines.of("grid", 1, "z") == lines.of("grid", 1) == 7
    assert lines.of("grid", 1, "missing", 3) == 7
    assert lines.of("missing") == 1
    assert lines.find("grid", 0, "y", 1) == 6
    assert lines.find("grid", 0, "y", 2) is lines.find("missing") is None
    assert lines.values == {"a": 1, "grid": [{"x": 1, "y": [1, 2]}, {"z": 3}]}
