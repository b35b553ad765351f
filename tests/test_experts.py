"""Experts: what they are trained to, what is kept, what a kill or a second process leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdd import experts
from mmdd.batches import RealBatches
from mmdd.data.scenes import Scenes
from mmdd.distill import Context
from mmdd.encoders import ModelConfig, build_model
from mmdd.errors import ArtefactError, NonFiniteError
from mmdd.evaluation import SplitScorer
from mmdd.experts import (
    ExpertBuffer,
    ExpertConfig,
    Layout,
    buffer_folder,
    prepare_experts,
    train_experts,
)
from mmdd.losses import info_nce
from mmdd.protocols import PROTOCOLS, Protocol, trained_parameters

CPU = torch.device("cpu")
MakeContext = Callable[..., Context]


def config(**changes: Any) -> ExpertConfig:
    return ExpertConfig(
        **{"count": 2, "epochs": 2, "batch_size": 16, "momentum": 0.9, "lr_image": 0.01} | changes
    )


@pytest.fixture(scope="module")
def make_context() -> MakeContext:
    scenes = Scenes.generate({"train": 40, "val": 20, "test": 20})
    model = build_model(ModelConfig(dim=12))

    def make(protocol: Protocol = "image+text_head") -> Context:
        own = deepcopy(model)
        real = RealBatches(scenes, "train", own, protocol, CPU)
        # Experts do not look at the set.
        return Context(None, real, own, protocol, 0, model_config={"pair": "scenes-tiny"})  # type: ignore[arg-type]

    return make


# -- flat vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_layout_is_a_bijection(make_context: MakeContext, protocol: Protocol) -> None:
    model = make_context(protocol).model
    layout = Layout.of(model, protocol)
    trained = trained_parameters(model, protocol)
    assert set(layout.names) == set(trained)
    flat = layout.flatten(trained)
    assert flat.numel() == sum(p.numel() for p in trained.values())
    named = layout.named(layout.parts(flat))
    for name, parameter in trained.items():
        assert torch.equal(named[name], parameter)
    assert flat.data_ptr() != next(iter(trained.values())).data_ptr()
    other = deepcopy(model)
    layout.load(other, flat + 1)
    for name, parameter in trained_parameters(other, protocol).items():
        assert torch.equal(parameter, trained[name] + 1)
    parts = layout.parts(flat)
    first = {name.split(".")[0] for name in named}
    assert first == set(layout.sizes)
    assert [p.numel() for p in parts] == list(layout.sizes.values())


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_expert_is_plain_sgd_on_real_data(
    make_context: MakeContext, tmp_path: Path, protocol: Protocol
) -> None:
    """Every snapshot against a loop written out with an optimiser of its own."""
    context = make_context(protocol)
    wanted = config(weight_decay=0.01, lr_text=0.02)
    buffer, cost = prepare_experts(wanted, context, tmp_path, progress=False)
    assert buffer.snapshots == 2
    seed = buffer.manifests[1]["seed"]
    model = make_context(protocol).model
    model.reset_heads(seed=seed)
    model.eval()  # no dropout in these encoders
    trained = trained_parameters(model, protocol)
    lrs = {"image_encoder": 0.01, "text_encoder": 0.02, "image_head": 0.1, "text_head": 0.1}
    velocity = {name: torch.zeros_like(p) for name, p in trained.items()}
    layout = Layout.of(model, protocol)
    assert torch.equal(buffer.read(1, 0), layout.flatten(trained))
    losses = []
    for epoch in range(2):
        total = 0.0
        for batch in context.real.epoch(16, seed, epoch):
            loss = info_nce(*model(batch.images, batch.texts, batch.mask), 0.07)
            gradients = torch.autograd.grad(loss, list(trained.values()))
            with torch.no_grad():
                for (name, p), g in zip(trained.items(), gradients, strict=True):
                    velocity[name] = 0.9 * velocity[name] + g + 0.01 * p
                    p -= lrs[name.split(".")[0]] * velocity[name]
            total += loss.item()
        losses.append(total / 3)
        torch.testing.assert_close(
            buffer.read(1, epoch + 1), layout.flatten(trained), rtol=1e-5, atol=1e-6
        )
    assert buffer.manifests[1]["losses"] == pytest.approx(losses, rel=1e-4)
    recall = SplitScorer(context.real.dataset, "val", model, protocol, CPU).score(model)["mean"]
    assert buffer.manifests[1]["validation"][-1] == pytest.approx(recall, abs=1e-3)
    assert cost["expert_bytes"] == sum(
        path.stat().st_size for path in buffer.folder.glob("*/snapshot-*")
    )
    assert cost["expert_seconds"] == pytest.approx(buffer.seconds)
    assert buffer.seconds > 0


def test_snapshots_by_steps(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context()
    whole, _ = prepare_experts(config(), context, tmp_path, progress=False)
    often, _ = prepare_experts(config(snapshot_every=2), context, tmp_path, progress=False)
    assert whole.folder != often.folder
    assert often.snapshots == 3  # six steps
    assert torch.equal(often.read(0, 3), whole.read(0, 2))
    uneven, _ = prepare_experts(config(snapshot_every=4), context, tmp_path, progress=False)
    assert uneven.snapshots == 2  # after four steps, and the end
    assert torch.equal(uneven.read(0, 1), often.read(0, 2))
    assert torch.equal(uneven.read(0, 2), often.read(0, 3))


def test_experts_differ_and_depend_on_nothing_else(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context()
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    buffer, _ = prepare_experts(config(), context, tmp_path / "a", progress=False)
    assert not torch.equal(buffer.read(0, 0), buffer.read(1, 0))  # fresh projections each
    for name, parameter in context.model.named_parameters():
        assert torch.equal(parameter, before[name])
    torch.manual_seed(5)
    folder = buffer_folder(config(), context, tmp_path / "b")
    train_experts(config(), context, folder, numbers=[1], progress=False)
    alone = experts._snapshot(folder, 1, 2)
    assert alone.read_bytes() == experts._snapshot(buffer.folder, 1, 2).read_bytes()
    with pytest.raises(ArtefactError, match=r"expert 0 .* is not finished"):
        ExpertBuffer(folder, buffer.layout, 2)


def test_bfloat16_keeps_rounded_copies_of_the_same_experts(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context()
    exact, _ = prepare_experts(config(), context, tmp_path, progress=False)
    half, cost = prepare_experts(config(dtype="bfloat16"), context, tmp_path, progress=False)
    for snapshot in range(3):
        kept = half.read(0, snapshot)
        assert kept.dtype == torch.float32
        assert torch.equal(kept, exact.read(0, snapshot).to(torch.bfloat16).float())
    assert cost["expert_bytes"] < 0.51 * exact.num_bytes


def test_more_experts_extend_a_buffer(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context()
    small, _ = prepare_experts(config(), context, tmp_path, progress=False)
    stamp = experts._snapshot(small.folder, 0, 1).stat().st_mtime_ns
    large, _ = prepare_experts(config(count=3), context, tmp_path, progress=False)
    assert (small.folder, len(small), len(large)) == (large.folder, 2, 3)
    assert experts._snapshot(small.folder, 0, 1).stat().st_mtime_ns == stamp


def test_a_buffer_says_what_it_is(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context()
    buffer, _ = prepare_experts(config(), context, tmp_path, progress=False)
    about = json.loads((buffer.folder / "buffer.json").read_text())
    assert about["identity"]["dataset"] == context.real.dataset.fingerprint
    assert about["identity"]["experts"]["epochs"] == 2
    assert [name for name, _ in about["parameters"]] == list(buffer.layout.names)
    assert sum(torch.Size(shape).numel() for _, shape in about["parameters"]) == len(
        buffer.read(0, 0)
    )


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"lr_heads": 0.2}, {"seed": 1}, {"dtype": "bfloat16"}]
)
def test_other_experts_live_elsewhere(
    make_context: MakeContext, tmp_path: Path, change: dict[str, Any]
) -> None:
    context = make_context()
    assert buffer_folder(config(**change), context, tmp_path) != buffer_folder(
        config(), context, tmp_path
    )
    other = make_context("both")
    assert buffer_folder(config(), other, tmp_path) != buffer_folder(config(), context, tmp_path)


# -- many processes, kills, damage -----------------------------------------------------------------


def test_two_workers_train_each_expert_once(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    plain = experts._train

    def noted(number: int, *rest: Any) -> None:
        if not (rest[3] / f"expert-{number:03d}" / "manifest.json").exists():
            started.append(number)
        plain(number, *rest)

    monkeypatch.setattr(experts, "_train", noted)
    folder = tmp_path / "buffer"
    workers = [
        threading.Thread(
            target=train_experts,
            args=(config(count=4), make_context(), folder),
            kwargs={"progress": False},
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(started) == [0, 1, 2, 3]
    layout = Layout.of(make_context().model, "image+text_head")
    assert ExpertBuffer(folder, layout, 4).snapshots == 2


SCRIPT = textwrap.dedent(
    """
    from pathlib import Path
    import torch
    from mmdd.batches import RealBatches
    from mmdd.data.scenes import Scenes
    from mmdd.distill import Context
    from mmdd.encoders import ModelConfig, build_model
    from mmdd.experts import ExpertConfig, train_experts

    model = build_model(ModelConfig(dim=12))
    scenes = Scenes.generate({"train": 40, "val": 20, "test": 20})
    real = RealBatches(scenes, "train", model, "image+text_head", torch.device("cpu"))
    context = Context(None, real, model, "image+text_head", 0)
    config = ExpertConfig(count=2, epochs=4, batch_size=8, momentum=0.9, snapshot_every=3)


    def job(folder):
        train_experts(config, context, Path(folder), progress=False)
    """
)


def test_killed_experts_end_in_the_same_bits(
    tmp_path: Path, forking: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Ten kills at random moments, against a run that nobody disturbed."""
    process = forking(SCRIPT)
    assert process.stdin is not None
    assert process.stdout is not None

    def train(folder: Path, snapshots: int | None, delay: float = 0.0) -> int:
        """The exit code of a run that is killed a moment after it has kept so many snapshots."""
        process.stdin.write(f"{folder}\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        child = int(process.stdout.readline().split()[1])  # type: ignore[union-attr]
        while snapshots is not None and len(list(folder.glob("expert-*/snapshot-*"))) < snapshots:
            time.sleep(0.001)
        if snapshots is not None:
            time.sleep(delay)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
        return int(process.stdout.readline().split()[1])  # type: ignore[union-attr]

    assert train(tmp_path / "whole", None) == 0
    moments = random.Random(0)
    codes = [
        train(tmp_path / "shot", snapshots, 0.02 * moments.random())
        for snapshots in (1, 2, 3, 5, 6, 7, 9, 10, 11, 13)
    ]
    assert codes.count(-signal.SIGKILL) >= 5, "the kills came too late to test anything"
    assert train(tmp_path / "shot", None) == 0
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").glob("*/snap*"))
    assert len(names) == 2 * 8
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "shot" / name).read_bytes()
    kept = [
        {
            key: value
            for key, value in json.loads(
                (tmp_path / folder / "expert-000/manifest.json").read_text()
            ).items()
            if key not in ("seconds", "sha256")  # which covers the seconds
        }
        for folder in ("whole", "shot")
    ]
    assert kept[0] == kept[1]
    # A kill in the middle of a write may leave its temporary folder, and nothing else.
    whole, shot = (
        {p.relative_to(tmp_path / folder) for p in (tmp_path / folder).rglob("*")}
        for folder in ("whole", "shot")
    )
    assert whole <= shot
    strays = [p for p in shot - whole if not any(part.endswith(".part") for part in p.parts)]
    assert strays == []
    assert not any("state" in path.name for path in whole)


def test_damage_is_named(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context()
    buffer, _ = prepare_experts(config(), context, tmp_path, progress=False)
    path = experts._snapshot(buffer.folder, 0, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"snapshot-0001\.safetensors"):
        buffer.read(0, 1)
    with pytest.raises(ArtefactError, match=r"snapshot-0009\.safetensors does not exist"):
        buffer.read(0, 9)
    foreign = Layout.of(build_model(ModelConfig(dim=16)), "image+text_head")
    with pytest.raises(ArtefactError, match="no parameters of this model"):
        ExpertBuffer(buffer.folder, foreign, 2).read(0, 0)
    manifest = buffer.folder / "expert-001/manifest.json"
    manifest.write_text("{")
    with pytest.raises(ArtefactError, match="expert 1 "):
        ExpertBuffer(buffer.folder, buffer.layout, 2)


@pytest.mark.parametrize("damage", ["manifest", "cut off", "vanished", "state"])
def test_a_damaged_expert_is_trained_again(
    make_context: MakeContext, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_context()
    buffer, _ = prepare_experts(config(), context, tmp_path, progress=False)
    whole = {path: path.read_bytes() for path in buffer.folder.glob("*/snapshot-*")}
    here = buffer.folder / "expert-001"
    manifest, snapshot = here / "manifest.json", here / "snapshot-0001.safetensors"
    if damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"snapshots": 2', '"snapshots": 1'))
    elif damage == "cut off":
        snapshot.write_bytes(snapshot.read_bytes()[:-100])
    elif damage == "vanished":
        snapshot.unlink()
    else:
        manifest.unlink()
        (here / "state.safetensors").write_bytes(b"half a state")
    prepare_experts(config(), context, tmp_path, progress=False)
    assert "expert" in caplog.text
    assert {path: path.read_bytes() for path in whole} == whole
    assert len(list(here.iterdir())) == 4  # the start, two snapshots, a manifest


def test_what_a_kill_at_the_end_left_is_removed(make_context: MakeContext, tmp_path: Path) -> None:
    buffer, _ = prepare_experts(config(), make_context(), tmp_path, progress=False)
    here = buffer.folder / "expert-001"
    for name in ("state.safetensors", "state.previous.safetensors"):
        (here / name).write_bytes(b"the state of the last step")
    prepare_experts(config(), make_context(), tmp_path, progress=False)
    assert not list(here.glob("state*"))
    assert len(list(here.iterdir())) == 4  # the start, two snapshots, a manifest


def test_a_flipped_bit_in_a_snapshot_is_refused(make_context: MakeContext, tmp_path: Path) -> None:
    buffer, _ = prepare_experts(config(), make_context(), tmp_path, progress=False)
    path = experts._snapshot(buffer.folder, 1, 2)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"checksum.* Remove .*expert-001: the next run trains"):
        buffer.read(1, 2)
    shutil.rmtree(path.parent)
    again, _ = prepare_experts(config(), make_context(), tmp_path, progress=False)
    content[-1000] ^= 1
    assert path.read_bytes() == bytes(content)
    again.read(1, 2)


def test_an_expert_that_diverges_says_so(make_context: MakeContext, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="lower its learning rates"):
        prepare_experts(
            config(lr_image=1e30, lr_heads=1e30), make_context(), tmp_path, progress=False
        )


def test_dropout_masks_depend_on_the_key_alone() -> None:
    dropout = torch.nn.Dropout(0.5)
    before = torch.random.get_rng_state()
    masks = []
    for key in ([0, 1], [0, 1], [0, 2]):
        with experts.seeded_dropout(key, CPU):
            masks.append(dropout(torch.ones(64)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_was_read_is_the_readers_own(make_context: MakeContext, tmp_path: Path) -> None:
    buffer, _ = prepare_experts(config(count=1), make_context(), tmp_path, progress=False)
    first = buffer.read(0, 1)
    before = first.clone()
    first += 1
    assert torch.equal(buffer.read(0, 1), before)
