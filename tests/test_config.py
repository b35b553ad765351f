"""Configurations: what they refuse, and which of their parts name a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmdd.config import RunConfig, code_of, is_stale, method_entry
from mmdd.distill import METHODS, CovMatch, CovMatchConfig
from mmdd.errors import ConfigError
from mmdd.evaluation import EvaluationConfig
from mmdd.paths import data_file
from mmdd.selection import SELECTORS


def make(**values: Any) -> RunConfig:
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"pair": 3}, "pair"),
        ({"dataset": {"sise": 32}}, r"dataset\.sise"),
        ({"model": {"dims": 4}}, r"model\.dims"),
        ({"model": {"image": {"kind": "timm", "name": "x", "image_size": 8, "w": 1}}}, r"image\.w"),
        ({"settings": {"rhoo": 1.0}}, "rhoo"),
        ({"evaluation": {"epoch": 4}}, r"evaluation\.epoch"),
        ({"runtime": {"cuda": True}}, r"runtime\.cuda"),
    ],
)
def test_unknown_keys_are_refused_at_every_level(values: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?s){named}.*Extra inputs are not permitted"):
        make(**values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"pairs": 0}, "pairs"),
        ({"seed": -1}, "seed"),
        ({"protocol": "head"}, "protocol"),
        ({"dataset": {"size": 4}}, "size"),
        ({"dataset": {"reader": "flickr"}}, "reader"),
        ({"dataset": {"train": 1}}, "train"),
        ({"settings": {"rho": -1}}, "rho"),
        ({"evaluation": {"momentum": 1.0}}, "momentum"),
        ({"sweep": "../elsewhere"}, "sweep"),
        ({"sweep": ""}, "sweep"),
        ({"runtime": {"threads": 0}}, "threads"),
    ],
)
def test_impossible_values_are_refused(values: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        make(**values)


def test_names_of_methods_and_starts() -> None:
    for method in (*METHODS, *SELECTORS, "full"):
        assert make(method=method, protocol="heads").method == method
    with pytest.raises(
        ValidationError,
        match=f"method 'covmach' is unknown; known: {', '.join([*METHODS, *SELECTORS, 'full'])}",
    ):
        make(method="covmach")
    with pytest.raises(ValidationError, match=r"init 'magic' is unknown; known: .*random.*, noise"):
        make(init="magic")


def test_settings_belong_to_the_method() -> None:
    assert make().settings == CovMatchConfig()
    assert make(settings={"rho": 3}).settings == CovMatchConfig(rho=3.0)
    assert make(settings=CovMatchConfig(rho=3.0)).run_id == make(settings={"rho": 3}).run_id
    assert make(method="random").settings is None
    assert make(method="random", settings=None).settings is None
    for method in ("random", "full"):
        with pytest.raises(ValidationError, match=f"method '{method}' has no settings"):
            make(method=method, settings={"rho": 3})


def test_method_entry() -> None:
    assert method_entry(make()).distiller is CovMatch
    with pytest.raises(ConfigError, match="'random' selects pairs"):
        method_entry(make(method="random"))


# -- identity --------------------------------------------------------------------------------------


def test_where_and_how_do_not_name_a_run() -> None:
    plain = make()
    elsewhere = make(
        sweep="other",
        runtime={"device": "cpu", "threads": 2, "data": "/photos", "checkpoint_every": 7},
    )
    assert plain.run_id == elsewhere.run_id
    assert plain.set_id == elsewhere.set_id
    assert not {"sweep", "runtime"} & plain.identity().keys()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "random"},
        {"pairs": 50},
        {"protocol": "heads"},
        {"seed": 1},
        {"dataset": {"train": 50}},
        {"dataset": {"name": "mine", "reader": "karpathy"}},
        {"model": {"dim": 64}},
        {"model": {"pair": "cifar-minilm"}},
        {"settings": {"rho": 3.0}},
    ],
    ids=str,
)
def test_everything_that_decides_the_set_names_it(change: dict) -> None:
    assert make(**change).run_id != make().run_id
    assert make(**change).set_id != make().set_id


def test_the_evaluation_names_the_run_but_not_the_set() -> None:
    changed = make(evaluation={"epochs": 7})
    assert changed.run_id != make().run_id
    assert changed.set_id == make().set_id


def test_what_a_method_does_not_use_is_no_part_of_its_name() -> None:
    assert make(method="full", pairs=5).run_id == make(method="full", pairs=6).run_id
    assert "pairs" not in make(method="full").identity()
    assert "pairs" in make(method="random").identity()
    assert "init" not in make(method="random").identity()
    assert "init" in make().identity()


def test_spelling_does_not_count() -> None:
    assert make(settings={"rho": 2, "lambda_": 0.1}).run_id == make(settings={}).run_id
    written_out = make().model_dump(mode="json")
    assert RunConfig.model_validate(json.loads(json.dumps(written_out))).run_id == make().run_id


def test_run_ids_stand() -> None:
    """The names of the records that are committed: a change of a default renames runs."""
    config = make(
        method="random",
        pairs=100,
        protocol="both",
        dataset={"train": 1000, "val": 100, "test": 200},
        evaluation={"students": 5, "epochs": 60, "scores": 3},
    )
    assert config.run_id == "3db3231fde780f64"
    assert make(method="covmatch", pairs=100, settings={"rho": 1.5}).run_id == "6d9bbe7c5cc5b6e2"
    assert make(method="covmatch", pairs=100, settings={"rho": 1.5}).set_id == "c61a13301e4b67ef"


def test_identity_is_json() -> None:
    identity = make(model={"pair": "nfnet-bert"}).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["settings"]["rho"] == 2.0


# -- what names a run ------------------------------------------------------------------------------


def test_precision_names_a_run_unless_it_is_single() -> None:
    assert "precision" not in make().identity()
    assert make(precision="float32").run_id == make().run_id
    assert make(precision="bfloat16").run_id != make().run_id
    assert make(precision="bfloat16").set_id != make().set_id
    assert len({make(precision=p).run_id for p in ("float32", "tf32", "bfloat16")}) == 3
    with pytest.raises(ValidationError, match="precision"):
        make(precision="float16")


def test_local_weights_are_named_by_their_content(tmp_path: Path) -> None:
    def with_weights(path: Path) -> RunConfig:
        text = {"kind": "huggingface", "name": "bert", "weights": str(path)}
        image = {"kind": "timm", "name": "x", "image_size": 32, "weights": str(path / "a.bin")}
        return make(model={"text": text, "image": image})

    for folder in ("one", "two"):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / "a.bin").write_bytes(b"weights")
    one, two = (with_weights(tmp_path / name / "model") for name in ("one", "two"))
    assert one.run_id == two.run_id
    assert str(tmp_path) not in json.dumps(one.identity())
    assert one.identity()["model"]["text"]["weights"].startswith("local:model:")
    assert one.model.text is not None
    assert one.model.text.weights == str(tmp_path / "one" / "model")  # the run itself finds them
    (tmp_path / "two" / "model" / "a.bin").write_bytes(b"other weights")
    assert with_weights(tmp_path / "two" / "model").run_id != one.run_id
    for word in ("hub", "random", "package"):
        text = {"kind": "huggingface", "name": "bert", "weights": word}
        assert make(model={"text": text}).identity()["model"]["text"]["weights"] == word


def test_students_take_the_loss_that_the_set_was_distilled_with() -> None:
    assert make(method="lors").evaluation.loss == "wbce"
    assert make(method="lors", settings={"loss": "ence"}).evaluation.loss == "ence"
    assert make(method="mtt").evaluation.loss == "info_nce"
    assert make(method="covmatch").evaluation.loss == "info_nce"
    chosen = make(method="lors", evaluation={"loss": "ence", "epochs": 3}).evaluation
    assert (chosen.loss, chosen.epochs) == ("ence", 3)
    assert make(method="lors", evaluation={"epochs": 3}).evaluation.loss == "wbce"
    assert make(method="lors", evaluation=EvaluationConfig(epochs=3)).evaluation.loss == "wbce"
    given = make(method="lors", evaluation=EvaluationConfig(loss="bce")).evaluation
    assert given.loss == "bce"
    again = RunConfig.model_validate(make(method="lors").model_dump(mode="json"))
    assert again.run_id == make(method="lors").run_id


def test_the_code_of_a_run() -> None:
    hashes = {make(method=m).source_hash for m in ("full", "random", "covmatch", "mtt")}
    hashes |= {make(model={"pair": "cifar-minilm"}).source_hash}
    hashes |= {make(student={"pair": "cifar-minilm"}).source_hash}
    assert len(hashes) == 6
    assert make(method="mtt").source_hash == make(method="lors").source_hash  # one module
    identity = make().identity()
    assert code_of(identity) == make().source_hash
    for key, value in (("method", "nonsense"), ("init", ""), ("model", {"pair": "no-such-pair"})):
        with pytest.raises(ConfigError, match=r"no method or start|unknown encoder pair"):
            code_of(identity | {key: value})


def test_the_code_of_a_set_knows_nothing_of_its_students() -> None:
    other = {"pair": "scenes-resnet"}
    assert make(student=other).source_hash != make().source_hash
    assert make(student=other).set_source_hash == make().set_source_hash
    assert make(student=other).set_id == make().set_id
    # A selection goes by the features of those who learn from it.
    chosen, others = make(method="herding"), make(method="herding", student=other)
    assert others.set_source_hash != chosen.set_source_hash
    assert others.set_id != chosen.set_id


def test_the_weights_that_ship_count_as_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make().source_hash
    for file in data_file("pretrained/scenes_tiny.safetensors").parent.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr("mmdd.encoders._weights.data_file", lambda name: tmp_path / Path(name).name)
    assert make().source_hash == before
    trained_again = tmp_path / "scenes_tiny.safetensors"
    trained_again.write_bytes(trained_again.read_bytes() + b" ")
    assert make().source_hash != before


def test_records_of_code_that_is_gone_are_stale() -> None:
    record = {"config": make().identity(), "environment": {"source_hash": make().source_hash}}
    assert not is_stale(record)
    assert is_stale(record | {"environment": {"source_hash": "0123456789ab"}})
    for key, value in (("method", "gone"), ("model", {"pair": "gone"}), ("model", {"pear": 1})):
        assert is_stale(record | {"config": make().identity() | {key: value}})


def test_what_belongs_to_a_run_only_where_it_counts() -> None:
    """Keys that came later leave the ids of the runs without them as they were."""
    plain = make().identity()
    assert not {"student", "selection", "precision"} & set(plain)
    other = make(selection={"warm_up_epochs": 2})
    assert other.run_id == make().run_id
    assert make(init="noise", selection={"warm_up_epochs": 2}).run_id == make(init="noise").run_id
    assert make(init="noise").run_id != make().run_id
    student = make(student={"pair": "cifar-minilm"})
    assert student.run_id != make().run_id
    assert student.set_id == make().set_id  # the distillation knows nothing of it
    chosen = make(method="random", student={"pair": "cifar-minilm"})
    assert chosen.set_id != make(method="random").set_id  # its texts are the students' vectors
    assert make().selector == "random"
    assert make(init="noise").selector == "noise"
    assert make(method="random").selector == "random"
