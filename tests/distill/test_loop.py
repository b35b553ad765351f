"""The loop: kills, foreign checkpoints, numbers that are not finite, clipping, history."""

import os
import random
import signal
import subprocess
import textwrap
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmdd import devices
from mmdd.batches import RealBatches
from mmdd.distill import (
    METHODS,
    Context,
    CovMatch,
    CovMatchConfig,
    Distiller,
    Progress,
    distill,
    iterate,
)
from mmdd.distill.loop import HISTORY_POINTS
from mmdd.errors import ArtefactError, ConfigError, NonFiniteError
from mmdd.synthetic import SyntheticPairs

MakeContext = Callable[..., Context]
SETTINGS: dict[str, Any] = {
    "iterations": 12,
    "real_batch": 8,
    "reset_every": 5,
    "normalize": True,
    "optimizer": "adam",
    "lr_image": 0.01,
    "lr_text": 0.01,
}


def covmatch(context: Context, **changes: Any) -> CovMatch:
    return CovMatch(CovMatchConfig(**{**SETTINGS, **changes}), context)


def assert_same_bits(a: SyntheticPairs, b: SyntheticPairs) -> None:
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.texts, b.texts)


# -- checkpoints -----------------------------------------------------------------------------------


# Distils into a folder with a method, and tells of every iteration.
SCRIPT = textwrap.dedent(
    """
    from dataclasses import replace
    from pathlib import Path

    import torch

    from mmdd.batches import RealBatches, real_pairs
    from mmdd.data.scenes import Scenes
    from mmdd.distill import METHODS, Context, distill
    from mmdd.encoders import ModelConfig, build_model
    from mmdd.selection import select


    scenes = Scenes.generate({"train": 40, "val": 2, "test": 2})
    model = build_model(ModelConfig(dim=12))
    SETTINGS = {
        "covmatch": {
            "real_batch": 8, "reset_every": 7, "synthetic_batch": 5, "normalize": True,
        },
        "lors": {
            "syn_steps": 2, "synthetic_batch": 4, "max_start_epoch": 1, "lr_similarity": 0.01,
            "experts": {"count": 2, "epochs": 2, "batch_size": 8, "lr_image": 0.02},
        },
    }


    def job(folder, name, optimizer, iterations):
        folder, iterations = Path(folder), int(iterations)
        images, choice = select("random", scenes, 6, 0)
        start = real_pairs(scenes, images, choice, model, "both")
        real = RealBatches(scenes, "train", model, "both", torch.device("cpu"))
        context = Context(start, real, model, "both", seed=3)
        entry = METHODS[name]
        rates = {"optimizer": optimizer, "lr_image": 0.01, "lr_text": 0.01}
        config = entry.config(iterations=iterations, **rates, **SETTINGS[name])
        prepared, _ = entry.distiller.prepare(config, context, folder, progress=False)
        method = entry.distiller(config, replace(context, prepared=prepared))
        result, progress = distill(
            method, iterations, checkpoint=folder / "checkpoint.safetensors", checkpoint_every=3,
            progress=False, callback=lambda i, s: print(i, flush=True), callback_every=1,
        )
        assert progress.iterations == len(progress.history["loss"]) == iterations
        result.save(folder / "set.safetensors")
    """
)


@pytest.fixture(scope="module")
def runner(forking: Callable[[str], subprocess.Popen[str]]) -> subprocess.Popen[str]:
    return forking(SCRIPT)


def shoot(
    runner: subprocess.Popen[str], folder: Path, method: str, at: int | None, delay: float = 0.0
) -> tuple[list[int], int]:
    """(iterations that were heard of, exit code) of a run that is killed after iteration `at`."""
    assert runner.stdin is not None
    assert runner.stdout is not None
    folder.mkdir(exist_ok=True)
    runner.stdin.write(f"{folder} {method}\n")
    runner.stdin.flush()
    heard, child = [], 0
    for line in runner.stdout:
        if line.startswith("pid"):
            child = int(line.split()[1])
        elif line.startswith("ended"):
            return heard, int(line.split()[1])
        else:
            heard.append(int(line))
            if heard[-1] == at:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
    raise AssertionError("the runner ended")


@pytest.mark.parametrize(
    ("method", "kills", "iterations"),
    [("covmatch sgd", 3, 40), ("covmatch adam", 3, 40), ("lors adam", 10, 120)],
)
def test_killed_runs_end_in_the_same_bits(
    tmp_path: Path, runner: subprocess.Popen[str], method: str, kills: int, iterations: int
) -> None:
    method = f"{method} {iterations}"
    whole, code = shoot(runner, tmp_path / "whole", method, None)
    assert (whole, code) == (list(range(1, iterations + 1)), 0)
    moments = random.Random(method)
    done = 0
    for _ in range(kills):
        at = done + 3 + moments.randint(1, 3)
        # Some milliseconds later, in the middle of whatever comes next.
        heard, code = shoot(runner, tmp_path / "shot", method, at, 0.02 * moments.random())
        assert code == -signal.SIGKILL
        # The last kill may have come after a checkpoint and before the word of it.
        assert heard[0] in (done + 1, done + 4), "it did not go on from the last checkpoint"
        done = heard[-1] // 3 * 3
    heard, code = shoot(runner, tmp_path / "shot", method, None)
    assert code == 0
    assert heard[0] in (done + 1, done + 4)
    assert heard[-1] == iterations
    first, second = (
        SyntheticPairs.load(tmp_path / name / "set.safetensors") for name in ("whole", "shot")
    )
    assert_same_bits(first, second)


def test_resume_in_the_middle(make_context: MakeContext, tmp_path: Path) -> None:
    whole, progress = distill(covmatch(make_context()), 12, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    for iterations in (4, 9, 12):
        part, resumed = distill(
            covmatch(make_context()), iterations, checkpoint=path, progress=False
        )
        assert resumed.iterations == iterations
    assert_same_bits(whole, part)
    assert resumed.history == progress.history
    assert resumed.seconds > 0
    again, _ = distill(covmatch(make_context()), 12, checkpoint=path, progress=False)
    assert_same_bits(whole, again)


@pytest.mark.parametrize(
    ("context", "changes"),
    [
        ({"pairs": 7}, {}),
        ({"protocol": "heads"}, {}),
        ({"seed": 1}, {}),
        ({}, {"rho": 3.0}),
        ({}, {"lr_image": 0.02}),
        ({}, {"optimizer": "sgd"}),
        ({}, {"learn_texts": False}),
        ({"model": "resnet-bert"}, {}),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(
    make_context: MakeContext, tmp_path: Path, context: dict, changes: dict
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    distill(covmatch(make_context()), 2, checkpoint=path, progress=False)
    before = path.read_bytes()
    with pytest.raises(ArtefactError, match=r"checkpoint\.safetensors does not fit.*Remove it"):
        distill(covmatch(make_context(**context), **changes), 4, checkpoint=path, progress=False)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_left_out(
    make_context: MakeContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is gone on from, or the start: to the same bits either way."""
    path = tmp_path / "checkpoint.safetensors"
    older = tmp_path / "checkpoint.previous.safetensors"
    whole, _ = distill(covmatch(make_context()), 12, progress=False)
    for broken, begins in (([], 6), ([path], 4), ([path, older], 0)):
        for name in (path, older):
            name.unlink(missing_ok=True)
        distill(covmatch(make_context()), 6, checkpoint=path, checkpoint_every=2, progress=False)
        for name in broken:
            content = bytearray(name.read_bytes())
            content[len(content) // 2] ^= 8
            name.write_bytes(bytes(content))
        caplog.clear()
        seen: list[int] = []
        again, _ = distill(
            covmatch(make_context()),
            12,
            checkpoint=path,
            progress=False,
            callback=lambda done, _: seen.append(done),  # noqa: B023
            callback_every=1,
        )
        assert seen[0] == begins + 1
        assert_same_bits(whole, again)
        assert [str(name) in caplog.text for name in (path, older)] == [
            name in broken for name in (path, older)
        ]


def test_more_iterations_go_on_from_a_shorter_run(
    make_context: MakeContext, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    distill(covmatch(make_context(), iterations=4), 4, checkpoint=path, progress=False)
    longer, _ = distill(covmatch(make_context()), 12, checkpoint=path, progress=False)
    whole, _ = distill(covmatch(make_context()), 12, progress=False)
    assert_same_bits(whole, longer)


# -- numbers that are not finite -------------------------------------------------------------------


def test_divergence_names_method_iteration_and_setting(
    make_context: MakeContext, tmp_path: Path
) -> None:
    method = covmatch(make_context(), optimizer="sgd", normalize=False, lr_image=1e6, lr_text=1e6)
    path = tmp_path / "c.safetensors"
    pattern = r"covmatch, iteration \d+: not finite: .*lr_image \(1000000\.0\)"
    with pytest.raises(NonFiniteError, match=pattern) as error:
        distill(method, 50, checkpoint=path, checkpoint_every=1, progress=False)
    good = tmp_path / "c.last_good.safetensors"
    assert str(good) in str(error.value)
    kept = SyntheticPairs.load(good)
    assert torch.isfinite(kept.images).all()
    assert torch.isfinite(kept.texts).all()
    with pytest.raises(NonFiniteError):  # the checkpoint holds a state that can be gone on from
        distill(
            covmatch(make_context(), optimizer="sgd", normalize=False, lr_image=1e6, lr_text=1e6),
            50,
            checkpoint=path,
            progress=False,
        )


class Settings(BaseModel):
    iterations: int = 3
    clip: float | None = None


class Line(Distiller):
    """The smallest method: one gradient that is given, and faults on demand."""

    name = "line"

    def __init__(self, context: Context, lr: float = 1.0, **faults: int) -> None:
        super().__init__(Settings(), context)
        self.x = context.start.images.clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.x], lr=lr)
        self.faults = faults
        self.gradients: list[float] = []

    def learnables(self) -> dict[str, Tensor]:
        return {"x": self.x}

    def backward(self, iteration: int) -> dict[str, float]:
        self.x.grad = torch.full_like(self.x, 2.0)
        if self.faults.get("gradient") == iteration:
            self.x.grad[0, 0, 0, 0] = torch.nan
        loss = float("inf") if self.faults.get("loss") == iteration else 10.0 - iteration
        return {"loss": loss, "term": 1.0}

    def after_step(self, iteration: int) -> dict[str, float]:
        assert self.x.grad is not None
        self.gradients.append(self.x.grad.norm().item())
        return {"model": float("nan") if self.faults.get("model") == iteration else 0.5}

    def export(self) -> SyntheticPairs:
        return SyntheticPairs(self.x.detach().clone(), self.context.start.texts)

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.x.copy_(state["x"])


@pytest.mark.parametrize(
    ("faults", "named", "steps"),
    [
        ({"loss": 2}, "loss", 2),
        ({"gradient": 2}, "gradient of x", 2),
        ({"model": 2}, "model", 3),  # the step on the set itself was good
    ],
)
@pytest.mark.parametrize("iterations", [3, 5])
def test_the_last_good_set_is_kept(
    make_context: MakeContext,
    tmp_path: Path,
    faults: dict[str, int],
    named: str,
    steps: int,
    iterations: int,
) -> None:
    context = make_context()
    path = tmp_path / "c.safetensors"
    with pytest.raises(NonFiniteError, match=f"line, iteration 2: not finite: {named}\\. Likely"):
        distill(
            Line(context, **faults), iterations, checkpoint=path, checkpoint_every=1, progress=False
        )
    kept = SyntheticPairs.load(tmp_path / "c.last_good.safetensors")
    torch.testing.assert_close(kept.images, context.start.images - 2.0 * steps)
    method = Line(context)  # the checkpoint is that of the last iteration that went well
    assert distill(method, 2, checkpoint=path, progress=False)[1].iterations == 2


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_step_that_overflows_is_no_result(
    make_context: MakeContext, tmp_path: Path, iterations: int
) -> None:
    context = make_context()
    path = tmp_path / "c.safetensors"
    with pytest.raises(NonFiniteError, match="iteration 0: not finite: x after the step"):
        distill(Line(context, lr=3e38), iterations, checkpoint=path, progress=False)
    kept = SyntheticPairs.load(tmp_path / "c.last_good.safetensors")
    assert torch.equal(kept.images, context.start.images)
    assert not path.exists()
    with pytest.raises(NonFiniteError, match="nothing was kept"):
        distill(Line(context, lr=3e38), iterations, progress=False)


def test_a_finite_set_whose_sum_overflows_goes_on(make_context: MakeContext) -> None:
    method = Line(make_context(), lr=0.0)
    with torch.no_grad():
        method.x.fill_(1e38)
    assert not torch.isfinite(method.x.sum())
    assert distill(method, 1, progress=False)[1].iterations == 1


# -- what the host reads ---------------------------------------------------------------------------


ASK = [
    *(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default),
    *(torch.ops.aten.equal.default, torch.ops.aten.nonzero.default),
    *(torch.ops.aten.masked_select.default, torch.ops.aten.repeat_interleave.Tensor),
    torch.ops.aten._unique2.default,
]
INDEX = [torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default]


def of_a_file() -> bool:
    """Whether what happens now happens to numbers of a file, which are the host's already."""
    return any(Path(frame.filename).name == "files.py" for frame in traceback.extract_stack())


class Reads(TorchDispatchMode):
    """Keeps what makes a host wait for its device: numbers and sizes that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rows = args[1] if func in INDEX else ()
        waits = func in ASK or any(r is not None and r.dtype == torch.bool for r in rows)
        if waits and not of_a_file():
            self.found.append(f"{func} in {traceback.extract_stack()[-9:-1]}")
        return func(*args, **(kwargs or {}))


class Transfers(TorchFunctionMode):
    """Counts tensors that become lists or arrays, which `Reads` does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.count += not of_a_file()
        return func(*args, **(kwargs or {}))


# Every method, and the ways that differ in what they compute beside the passes.
WAYS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("covmatch", {"update": "synthetic"}),
    ("dc", {"update": "real"}),
    ("mdm", {"model": "weighted-sum"}),
    ("mdm", {"model": "pretrained"}),
    ("mtt", {"engine": "finite-difference", "error_every": 1}),
    ("mtt", {"engine": "forward-over-reverse"}),
    ("tesla", {"engine": "finite-difference", "distance": "part"}),
    ("lors", {"engine": "forward-over-reverse", "loss": "ence"}),
    ("mtt", {"similarity": "full", "loss": "bce", "log_rates": True}),
]


@pytest.mark.parametrize(("name", "changes"), WAYS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("protocol", ["both", "image+text_head"])
def test_the_host_reads_once_in_an_iteration(
    make_method: Callable[..., Distiller],
    make_context: MakeContext,
    name: str,
    changes: dict[str, Any],
    protocol: str,
) -> None:
    if (name, protocol) == ("repblend", "both"):
        return  # it has no such texts
    method = make_method(name, make_context(protocol), **changes)
    for iteration in (0, 1):
        iterate(method, iteration)
    with Reads() as reads, Transfers() as transfers:
        terms = iterate(method, 2, clip=1.0)
    assert (reads.found, transfers.count) == ([], 1)
    assert all(isinstance(value, float) for value in terms.values())


def test_the_padding_of_texts_is_not_looked_at(make_context: MakeContext) -> None:
    method = covmatch(make_context("both", model="resnet-bert"), optimizer="sgd")
    with Reads() as reads:
        iterate(method, 0)
    assert reads.found == []


def test_what_waits_is_seen() -> None:
    x = torch.ones(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: x[x > 0],
        lambda: float(x[0]),
        lambda: torch.nonzero(x),
        lambda: torch.equal(x, x),
    ):
        with Reads() as reads:
            wait()
        assert reads.found


# -- clipping, history, callback -------------------------------------------------------------------


def test_clip(make_context: MakeContext) -> None:
    context = make_context()
    method = Line(context)
    distill(method, 2, clip=0.25, progress=False)
    np.testing.assert_allclose(method.gradients, 0.25, rtol=1e-4)
    free = Line(context)
    distill(free, 1, clip=1e6, progress=False)
    assert free.gradients[0] == pytest.approx(2.0 * context.start.images.numel() ** 0.5)


def test_clip_is_per_learnable(make_context: MakeContext) -> None:
    start = make_context().start
    method = covmatch(make_context(), optimizer="sgd", momentum=0.0, lr_image=1.0, lr_text=1.0)
    result, _ = distill(method, 1, clip=0.01, progress=False)
    assert (result.texts - start.texts).norm().item() == pytest.approx(0.01, rel=1e-2)
    step = (result.images - start.images) / method.set.std
    assert step.norm().item() == pytest.approx(0.01, rel=1e-2)


def test_history_and_its_thinning(make_context: MakeContext) -> None:
    _, progress = distill(Line(make_context()), 7, progress=False)
    assert progress.history == {
        "loss": [10.0 - i for i in range(7)],
        "term": [1.0] * 7,
        "model": [0.5] * 7,
    }
    assert progress.thinned(3)["iteration"] == [0.0, 3.0, 6.0]
    assert progress.thinned(3)["loss"] == [10.0, 7.0, 4.0]
    assert progress.thinned()["loss"] == progress.history["loss"]
    assert progress.peak_memory_bytes > 1 << 20
    many = Progress(history={"loss": [float(i) for i in range(12345)]})
    assert len(many.thinned()["loss"]) == HISTORY_POINTS == 100
    assert many.thinned()["iteration"][-1] == 12344
    assert Progress().thinned() == {"iteration": []}


def test_callback(make_context: MakeContext) -> None:
    seen = []
    method = Line(make_context())
    distill(method, 5, progress=False, callback=lambda i, s: seen.append((i, s)), callback_every=2)
    assert [i for i, _ in seen] == [2, 4, 5]
    start = method.context.start.images
    for i, pairs in seen:  # each a copy of its own
        torch.testing.assert_close(pairs.images, start - 2.0 * i)


def test_a_callback_changes_nothing(make_context: MakeContext) -> None:
    def spoil(iteration: int, pairs: SyntheticPairs) -> None:
        pairs.images.zero_()
        pairs.texts.zero_()

    plain, _ = distill(covmatch(make_context()), 3, progress=False)
    watched, _ = distill(
        covmatch(make_context()), 3, progress=False, callback=spoil, callback_every=1
    )
    assert_same_bits(plain, watched)


def test_the_bar_is_quiet_on_demand(
    make_context: MakeContext, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(Line(make_context()), 2, progress=False)
    assert capsys.readouterr().err == ""
    distill(Line(make_context()), 2)
    assert "line: 100%" in capsys.readouterr().err


# -- what a GPU would do, on a CPU that is told to -------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_changes_rounding_alone(
    name: str,
    make_method: Callable[..., Distiller],
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def outcome() -> tuple[SyntheticPairs, dict[str, float]]:
        context = make_context("image+text_head")
        devices.place(context.model, torch.device("cpu"))
        method = make_method(name, context)
        terms = iterate(method, 0)
        return method.export(), terms

    plain, before = outcome()
    monkeypatch.setattr(devices, "channels_last", lambda device: True)
    laid, after = outcome()
    assert laid.images.is_contiguous()  # a set is the same file wherever it was made
    torch.testing.assert_close(laid.images, plain.images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(laid.texts, plain.texts, rtol=1e-3, atol=1e-4)
    assert after == pytest.approx(before, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["covmatch", "dc", "cov-trajectory", "mdm"])
def test_batches_fetched_ahead_change_no_bit(
    name: str, make_method: Callable[..., Distiller], make_context: MakeContext
) -> None:
    def outcome(prefetch: bool, iterations: tuple[int, ...]) -> tuple[Any, list[dict[str, float]]]:
        context = make_context("image+text_head")
        real = context.real
        real = RealBatches(
            *(real.dataset, "train", context.model, context.protocol, real.device), prefetch
        )
        method = make_method(name, replace(context, real=real), update="real")
        return method, [iterate(method, i) for i in iterations]

    order = (0, 1, 2, 5, 6)  # a run that goes on elsewhere finds another batch than that fetched
    fetched, terms = outcome(True, order)
    plain, expected = outcome(False, order)
    assert terms == expected
    assert fetched.context.real.hits == 3
    assert plain.context.real.hits == 0
    assert_same_bits(fetched.export(), plain.export())


COMPILED = {
    "covmatch": "both",
    "dm": "image+text_head",
    "moments": "heads",
    "cov-similarity": "both",
    "cov-blend": "image+text_head",
}


@pytest.mark.parametrize(("name", "protocol"), COMPILED.items())
def test_compiled_encoders_give_the_same_numbers(
    name: str, protocol: str, make_method: Callable[..., Distiller], make_context: MakeContext
) -> None:
    plain = make_method(name, make_context(protocol))
    compiled = make_method(name, make_context(protocol))
    compiled.compile_encoders("aot_eager")
    for iteration in range(2):
        expected = iterate(plain, iteration)
        assert iterate(compiled, iteration) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert compiled.context.model.image_encoder._compiled_call_impl is not None
    assert deepcopy(compiled.context.model).image_encoder._compiled_call_impl is None
    torch.testing.assert_close(compiled.export().images, plain.export().images)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in COMPILED])
def test_what_cannot_be_compiled_says_why(
    name: str, make_method: Callable[..., Distiller], make_context: MakeContext
) -> None:
    method = make_method(name, make_context("image+text_head"))
    with pytest.raises(ConfigError, match=f"^{method.name} cannot be compiled: it "):
        method.compile_encoders()


def test_an_expert_that_stood_still_is_named(
    make_method: Callable[..., Distiller],
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method: Any = make_method("lors", make_context("image+text_head"))
    assert "student_lr_" in method.hint()
    first = method.experts.read(0, 0)
    monkeypatch.setattr(method.experts, "read", lambda expert, number: first)
    with pytest.raises(NonFiniteError, match="choose snapshots further apart: an expert did not"):
        distill(method, 1, progress=False)


def test_the_covariance_of_a_model_with_dropout_is_the_iterations_own(
    make_method: Callable[..., Distiller], make_context: MakeContext
) -> None:
    found = []
    for seed in (1, 2):
        method = make_method("cov-trajectory", make_context("both", model="resnet-bert"))
        torch.manual_seed(seed)
        found.append(iterate(method, 0))
        assert torch.initial_seed() == seed
    assert found[0] == found[1]
