"""Files that are whole or absent, and nested states without pickling."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmdd.errors import ArtefactError
from mmdd.files import (
    atomic_write,
    atomic_write_text,
    file_sha256,
    load_state,
    load_tensors,
    pack_state,
    save_checked,
    save_state,
    save_tensors,
    tensors_sha256,
    unpack_state,
)

ROOT = Path(__file__).resolve().parents[1]


def same(a: Any, b: Any) -> bool:
    """Equal structure, equal types, equal bits; a tuple may have become a list."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---- atomic writes -----------------------------------------------------------------------------


def test_atomic_write_creates_folders_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    atomic_write_text(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    atomic_write_text(path, "second")
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["text.txt"]


def test_a_raising_writer_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        atomic_write(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(RuntimeError):
        atomic_write(tmp_path / "new", half)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "ours", "x")
        (tmp_path / "plain").write_text("x")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_a_link_to_nowhere_in_particular_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "keep"
    assert (tmp_path / "link").read_text() == "new"


HALF_WRITTEN = """
import sys, time
from pathlib import Path
from mmdd.files import atomic_write
def write(temporary):
    with open(temporary, "w") as file:
        file.write("half of the new con")
        file.flush()
        print("half", flush=True)
        time.sleep(60)
atomic_write(Path(sys.argv[1]), write)
"""

ENDLESS = """
import itertools, sys
from pathlib import Path
import torch
from mmdd.files import save_state
for number in itertools.count():
    state = {"number": number, "values": [torch.full((50_000,), float(number))]}
    save_state(Path(sys.argv[1]), state)
    if number == 3:
        print("going", flush=True)
"""


def start(program: str, path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_kill_in_the_middle_of_a_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with start(HALF_WRITTEN, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    left = sorted(os.listdir(tmp_path))
    assert left[1:] == ["file"]  # the part that nobody could tidy up is hidden and named so
    assert left[0].startswith(".file.")
    assert left[0].endswith(".part")

    atomic_write_text(path, "new")  # an hour must pass before it is known that nobody writes there
    assert sorted(os.listdir(tmp_path)) == left
    long_ago = time.time() - 7_200
    os.utime(tmp_path / left[0], (long_ago, long_ago))
    atomic_write_text(path, "newer")
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with start(ENDLESS, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        time.sleep(random.uniform(0, 0.05))
        process.kill()
    state = load_state(path)
    assert state["number"] >= 3
    assert torch.equal(state["values"][0], torch.full((50_000,), float(state["number"])))


# ---- tensors with a header ---------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.tensor([[0, 1], [2, 3]]).to(dtype).T for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    header = {"number": 0.1, "text": "é\n", "list": [1, None, True], "nested": {"a": -1e-300}}
    save_tensors(path, tensors, header)
    loaded, read = load_tensors(path)
    assert read == header
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_a_loaded_tensor_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {})
    loaded, _ = load_tensors(path)
    save_tensors(path, {"a": torch.zeros(3)}, {})
    assert torch.equal(loaded["a"], torch.ones(3))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArtefactError, match=r"x\.safetensors does not exist"):
        load_tensors(path)
    with pytest.raises(ArtefactError, match=str(tmp_path)):
        load_tensors(tmp_path)  # a folder
    for content in (b"", b"\x00" * 7, b"not a tensor file at all", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=r"x\.safetensors is not a readable"):
            load_tensors(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ArtefactError, match="not one that mmdd wrote"):
        load_tensors(path)
    save_file({"a": torch.ones(2)}, path, metadata={"mmdd": "{broken"})
    with pytest.raises(ArtefactError, match="not one that mmdd wrote"):
        load_tensors(path)
    save_file({"a": torch.ones(2)}, path, metadata={"mmdd": "[1]"})
    with pytest.raises(ArtefactError, match="header is a list"):
        load_tensors(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(6.0)}, {"k": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtefactError):
            load_tensors(path)


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the test vector of FIPS 180
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_tensors_sha256_sees_names_types_shapes_and_bits() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    digest = tensors_sha256(base)
    assert tensors_sha256({"b": base["b"], "a": base["a"].clone()}) == digest
    assert tensors_sha256({**base, "a": torch.arange(8.0)[::2] / 2}) == digest  # strides do not
    flipped = base["a"].clone()
    flipped.view(torch.int32)[2] ^= 1
    for other in (
        {"a": base["b"], "b": base["a"]},
        {**base, "a": base["a"].view(2, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "a": flipped},
        {**base, "b": -base["b"]},  # -0.0
        {"a": base["a"]},
    ):
        assert tensors_sha256(other) != digest


# ---- nested states -----------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.builds(
        lambda dtype, size: torch.arange(size).to(dtype),
        st.sampled_from(DTYPES),
        st.integers(0, 3),
    )
)
KEYS = st.text(alphabet="ab/#.1", max_size=3) | st.integers(-2, 12)
STATES = st.recursive(
    LEAVES,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=3),
    max_leaves=12,
)


@given(state=STATES)
@settings(deadline=None, max_examples=60)
def test_pack_and_unpack(state: Any) -> None:
    tensors, skeleton = pack_state(state)
    assert same(state, unpack_state(tensors, json.loads(json.dumps(skeleton))))


@given(state=STATES)
@settings(deadline=None, max_examples=25)
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    save_state(path, state)
    assert same(state, load_state(path))


def test_paths_that_look_alike_keep_their_tensors() -> None:
    one, two, three = torch.ones(1), torch.ones(1) * 2, torch.ones(1) * 3
    for state in (
        {1: one, "1": two},
        {"a/b": one, "a": {"b": two}},
        {"a": [one], "a/0": two, "a/0#": three},
    ):
        tensors, skeleton = pack_state(state)
        assert same(state, unpack_state(tensors, skeleton))


def test_packed_tensors_are_copies() -> None:
    # A checkpoint taken now must not change with the next step, nor two names share one storage.
    values = torch.ones(4, requires_grad=True)
    tensors, _ = pack_state({"a": values, "view": values[:2]})
    with torch.no_grad():
        values.mul_(3)
    assert torch.equal(tensors["/a"], torch.ones(4))
    assert torch.equal(tensors["/view"], torch.ones(2))
    assert not tensors["/a"].requires_grad


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_optimiser_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    def build() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        if name == "sgd":
            return parameter, torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
        return parameter, torch.optim.Adam([parameter], lr=0.1, betas=(0.5, 0.9))

    def step(parameter: torch.nn.Parameter, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        (parameter**2 * torch.rand(7)).sum().backward()
        optimiser.step()

    torch.manual_seed(0)
    parameter, optimiser = build()
    for _ in range(3):
        step(parameter, optimiser)
    path = tmp_path / "checkpoint.safetensors"
    save_state(
        path,
        {
            "parameter": parameter,
            "optimiser": optimiser.state_dict(),
            "rng": torch.get_rng_state(),
        },
    )
    for _ in range(3):
        step(parameter, optimiser)

    torch.manual_seed(99)
    again, other = build()
    state = load_state(path)
    assert list(state["optimiser"]["state"]) == [0]  # an integer, as torch wants it
    with torch.no_grad():
        again.copy_(state["parameter"])
    other.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"])
    for _ in range(3):
        step(again, other)
    assert torch.equal(again, parameter)


def test_a_state_that_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {}, {"format": "something else"})
    with pytest.raises(ArtefactError, match="another kind of mmdd file"):
        load_state(path)
    save_checked(path, {}, {"state": {"tensor": "/gone"}})
    with pytest.raises(ArtefactError, match="incomplete"):
        load_state(path)
    save_checked(path, {}, {"state": {"unknown": 1}})
    with pytest.raises(ArtefactError, match="incomplete"):
        load_state(path)


def test_a_flipped_bit_in_a_saved_state_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_state(path, {"weights": torch.arange(64, dtype=torch.float32)})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match="checksum"):
        load_state(path)


def test_a_value_that_json_cannot_hold_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": 1})
    with pytest.raises(TypeError):
        save_state(path, {"a": object()})
    assert load_state(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.safetensors"]
