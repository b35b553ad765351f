"""Presets: complete settings by name, the papers' numbers, and wishes that win."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmdd.config import RunConfig
from mmdd.distill import METHODS, CovMatchConfig
from mmdd.encoders import PAIRS
from mmdd.errors import ConfigError
from mmdd.presets import (
    INIT,
    OURS,
    PAPER,
    SELECTION,
    STUDENTS,
    TUNED,
    TUNED_INIT,
    merge,
    preset,
)
from mmdd.protocols import PROTOCOLS
from mmdd.runs import run
from mmdd.selection import SELECTORS

NAMES = ("tiny", "small", "photos", "gpu", "paper")


def covmatch(config: RunConfig) -> CovMatchConfig:
    assert isinstance(config.settings, CovMatchConfig)
    return config.settings


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", ["covmatch", "random", "full"])
def test_every_preset_is_a_run(name: str, protocol: str, method: str) -> None:
    config = preset(name, method=method, protocol=protocol)
    assert config.method == method
    assert config.protocol == protocol
    assert config.model.pair in PAIRS
    assert (config.settings is None) == (method != "covmatch")


def test_presets_differ() -> None:
    assert len({preset(name).run_id for name in NAMES}) == len(NAMES)
    assert preset("tiny").dataset.train == 1000
    assert preset("photos").dataset.reader == "karpathy"
    assert preset("gpu").precision == "bfloat16"
    assert preset("paper").dataset.size == 224


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_run_of_every_size(name: str, method: str) -> None:
    config = preset(name, method=method, protocol="image+text_head")
    assert config.settings is not None
    if name == "tiny":
        assert config.settings.iterations <= 120  # type: ignore[attr-defined]
    if name == "paper":
        follows = method in ("mtt", "tesla", "tesla-wbce", "lors", "amd")
        assert config.model.pair == ("nfnet-bert-lors" if follows else "nfnet-bert")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_run_of_every_method(method: str, tmp_path: Path) -> None:
    """Settings that contradict each other, such as too few snapshots, show when it runs."""
    settings: dict[str, Any] = {"iterations": 2}
    if "experts" in METHODS[method].config.model_fields:
        settings["experts"] = {"count": 2}
    config = preset(
        "tiny",
        method=method,
        protocol="image+text_head",
        pairs=5,
        settings=settings,
        evaluation={"students": 1, "epochs": 1, "scores": 1},
        runtime={"progress": False, "device": "cpu", "experts": str(tmp_path / "experts")},
    )
    record = run(config, tmp_path)
    assert record["cost"]["iterations"] == 2
    assert 0 <= record["students"][0]["test"]["mean"] <= 100


def test_unknown_names_and_keys() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'huge'; known: tiny, small"):
        preset("huge")
    with pytest.raises(ValidationError, match="batchsize"):
        preset("tiny", evaluation={"batchsize": 3})
    with pytest.raises(ValidationError, match="rhoo"):
        preset("tiny", settings={"rhoo": 3})


@pytest.mark.parametrize("name", NAMES)
def test_wishes_win_and_leave_the_rest(name: str) -> None:
    plain = preset(name)
    wishes: dict[str, Any] = {
        "settings": {"rho": 9.0},
        "evaluation": {"lr_image": 0.5},
        "dataset": {"seed": 4},
        "runtime": {"threads": 3},
    }
    wished = preset(name, **wishes)
    assert covmatch(wished) == covmatch(plain).model_copy(update={"rho": 9.0})
    assert wished.evaluation == plain.evaluation.model_copy(update={"lr_image": 0.5})
    assert wished.dataset == plain.dataset.model_copy(update={"seed": 4})
    assert wished.runtime == plain.runtime.model_copy(update={"threads": 3})
    assert preset(name).run_id == plain.run_id  # nothing was written into the tables


def test_a_complete_configuration_passes_any_preset_unchanged() -> None:
    """What the workhorse notebook relies on when a sweep hands it one."""
    for name in NAMES:
        for method in ("covmatch", "random", "full"):
            config = preset(name, method=method, protocol="image+text_head", sweep="mine")
            for other in NAMES:
                assert preset(other, **config.model_dump(mode="json")) == config


def test_published_numbers_of_lors() -> None:
    """LoRS, Table 11."""

    def settings(pairs: int, dataset: str) -> tuple[Any, ...]:
        config = preset("paper", method="lors", pairs=pairs, dataset={"name": dataset})
        s: Any = config.settings
        assert config.evaluation.loss == s.loss == "wbce"
        assert (s.lr_image, s.lr_rates, s.student_lr_image) == (s.lr_text, 0.01, 0.1)
        assert (s.synthetic_batch, s.syn_steps, s.expert_epochs) == (20, 8, 1)
        return s.lr_image, s.lr_similarity, s.alpha, s.rank, s.max_start_epoch

    # LoRS' own budgets are one pair smaller.
    assert settings(99, "flickr30k") == (100, 10, 3, 10, 2)
    assert settings(198, "flickr30k") == (100, 10, 3, 10, 2)
    assert settings(199, "flickr30k") == (1000, 10, 1, 5, 2)
    assert settings(499, "flickr30k") == (1000, 100, 0.01, 20, 3)
    assert settings(499, "coco") == (5000, 500, 1, 20, 2)


def test_published_numbers_of_mdm() -> None:
    rates = {
        "flickr8k": [100, 100, 1000],
        "flickr30k": [100, 1000, 1000],
        "coco": [1000, 1000, 5000],
    }
    for dataset, expected in rates.items():
        for pairs, lr in zip((100, 200, 500), expected, strict=True):
            config = preset(
                "paper",
                method="mdm",
                pairs=pairs,
                protocol="image+text_head",
                dataset={"name": dataset},
            )
            s: Any = config.settings
            assert (s.lr_image, s.lr_text) == (lr, lr)
            assert (s.optimizer, s.momentum, s.clip) == ("sgd", 0.5, 1.0)
            assert (s.real_batch, s.synthetic_batch, s.iterations) == (64, 64, 3000)
            weights = s.lambda_contrastive, s.lambda_agreement, s.lambda_discrepancy
            assert (weights, s.sigma, s.alpha) == ((1.0, 0.8, 0.8), 0.5, 0.5)
            assert (s.model, s.kernel) == ("interpolation", "geodesic")
            assert (s.experts.count, s.experts.epochs) == (20, 10)
            assert config.evaluation.lr_image == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_method_starts_where_its_paper_does_unless_told_otherwise(name: str) -> None:
    here = "k-means" if "k-means" in SELECTORS else "random"
    assert preset(name, method="mdm", protocol="image+text_head").init == here
    assert preset(name, method="mdm", protocol="image+text_head", init="random").init == "random"
    assert preset(name, method="covmatch").init == "random"
    assert set(INIT) <= set(METHODS)


def test_only_the_methods_of_this_project_have_a_start_that_was_tuned() -> None:
    assert set(METHODS) >= OURS >= {method for method, _, _ in TUNED_INIT}
    for (method, _, protocol), start in TUNED_INIT.items():
        assert preset("small", method=method, protocol=protocol).init == start
        assert preset("small", method=method, protocol=protocol, init="random").init == "random"


def test_published_numbers() -> None:
    def settings(pairs: int, dataset: str) -> CovMatchConfig:
        return covmatch(preset("paper", pairs=pairs, dataset={"name": dataset}))

    for dataset, weight in (("flickr30k", 0.6), ("coco", 0.5)):
        found = [settings(n, dataset) for n in (100, 200, 500)]
        assert [s.rho for s in found] == [2.0, 1.0, 1.0]
        assert [s.lambda_ for s in found] == [0.1, 0.1, weight]
        assert all(10_000 <= s.iterations <= 20_000 for s in found)
        assert all((s.optimizer, s.lr_image, s.momentum) == ("sgd", 1.0, 0.5) for s in found)
        assert all((s.reset_every, s.normalize) == (50, False) for s in found)
        # Between the published budgets the one from below; below all of them the first.
        assert settings(300, dataset) == settings(200, dataset)
        assert settings(1000, dataset) == settings(500, dataset)
        assert settings(20, dataset) == settings(100, dataset)
    students = preset("paper").evaluation
    assert (students.epochs, students.batch_size, students.students) == (100, 128, 5)
    assert (students.lr_image, students.lr_text, students.lr_heads) == (0.01, 0.01, 0.1)
    assert (students.momentum, students.weight_decay) == (0.9, 5e-4)


def test_tuned_and_published_settings_are_kept_apart() -> None:
    for table in (PAPER, TUNED, STUDENTS):
        assert table
    assert covmatch(preset("paper", model={"pair": "scenes-tiny"})).optimizer == "sgd"
    for method, pair, protocol in TUNED:
        config = preset("small", method=method, model={"pair": pair}, protocol=protocol)
        assert config.settings is not None
        small = config.settings.model_dump()
        assert merge(small, TUNED[(method, pair, protocol)]) == small
    for protocol in ("both", "image+text_head"):
        tiny, small = (covmatch(preset(name, protocol=protocol)) for name in ("tiny", "small"))
        assert tiny.iterations < small.iterations
        assert tiny == small.model_copy(update={"iterations": tiny.iterations})


def test_students_are_the_same_for_all_methods() -> None:
    for pair, protocol in STUDENTS:
        found = [
            preset("small", method=method, model={"pair": pair}, protocol=protocol).evaluation
            for method in ("covmatch", "random", "full")
        ]
        assert found[0] == found[1] == found[2]
        assert found[0].model_dump() | STUDENTS[(pair, protocol)] == found[0].model_dump()


def test_selections_warm_up_the_pair_that_they_go_by() -> None:
    for pair, rates in SELECTION.items():
        for method in ("herding", "covmatch"):
            chosen = preset("small", method=method, model={"pair": pair}).selection
            assert chosen.model_dump() | rates == chosen.model_dump()
            wished = preset("small", method=method, selection={"lr_heads": 0.7})
            assert wished.selection.lr_heads == 0.7
    other = {"pair": "cifar-minilm"}
    tables = {name: preset("small", method="herding", model={"pair": name}).selection for name in (
        "scenes-tiny", "cifar-minilm", "nfnet-bert",
    )}  # fmt: skip
    # A selection alone is made for its students; the start of a distillation is not.
    alone = preset("small", method="herding", student=other)
    start = preset("small", method="covmatch", init="herding", student=other)
    assert (alone.selection, start.selection) == (tables["cifar-minilm"], tables["scenes-tiny"])
    # MDM's own rates with the papers' encoders.
    paper = preset("paper", method="herding", model={"pair": "scenes-tiny"}).selection
    assert tables["nfnet-bert"] == paper
    assert (paper.lr_image, paper.lr_heads) == (0.1, 0.1)
    assert (paper.warm_up_epochs, paper.forgetting_epochs, paper.batch_size) == (5, 10, 64)


def test_merge() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    merged = merge(base, {"a": {"c": {"f": 4}}, "e": {"g": 5}, "h": None})
    assert merged == {"a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": {"g": 5}, "h": None}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_the_paper_preset_trains_students_as_the_papers_do() -> None:
    lors = preset("paper", method="random", protocol="image+text_head").evaluation
    covmatch_paper = preset("paper", method="random", protocol="both").evaluation
    assert (lors.lr_image, lors.lr_heads) == (0.1, 0.1)
    assert (covmatch_paper.lr_image, covmatch_paper.lr_text, covmatch_paper.lr_heads) == (
        0.01,
        0.01,
        0.1,
    )


def test_tiny_never_runs_longer_than_the_tuned_settings() -> None:
    for (method, pair, protocol), tuned in TUNED.items():
        tiny = preset("tiny", method=method, protocol=protocol, model={"pair": pair})
        assert tiny.settings.iterations <= tuned["iterations"]  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["covmatch", "random", "full"])
def test_students_of_their_own_encoders_are_trained_as_those_want_it(method: str) -> None:
    protocol = "image+text_head"
    wishes: dict[str, Any] = {"method": method, "protocol": protocol}
    own = preset("small", **wishes)
    for pair in PAIRS:
        if (pair, protocol) not in STUDENTS:
            continue
        config = preset("small", student={"pair": pair}, **wishes)
        chosen = STUDENTS[(pair, protocol)]
        assert config.evaluation.model_dump() | chosen == config.evaluation.model_dump()
        # The set is still made with the model's encoders and their settings.
        assert (config.model, config.settings) == (own.model, own.settings)
    without = preset("small", student=None, **wishes)
    assert without.run_id == own.run_id
    assert "student" not in without.identity()


def test_every_pair_of_scenes_has_students() -> None:
    pairs = [pair for pair in PAIRS if pair.startswith("scenes-")]
    assert len(pairs) == 8
    rates = {pair: STUDENTS[(pair, "image+text_head")]["lr_image"] for pair in pairs}
    for pair in pairs:  # chosen once for each image encoder
        assert rates[pair] == rates[pair.removesuffix("-distil")]
    wished = preset(
        "small",
        method="random",
        protocol="image+text_head",
        student={"pair": "scenes-vit"},
        evaluation={"lr_image": 0.5},
    )
    assert wished.evaluation.lr_image == 0.5


def test_the_paper_preset_looks_up_the_students_pair_too() -> None:
    config = preset("paper", protocol="image+text_head", student={"pair": "nfnet-bert-lors"})
    assert config.evaluation.lr_image == 0.1
    foreign = preset("paper", protocol="image+text_head", student={"pair": "scenes-vit"})
    assert foreign.evaluation.lr_image == 0.01  # the default: the papers have no such student
