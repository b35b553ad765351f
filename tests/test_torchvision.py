"""The torchvision import is repaired where the builds differ, and left alone everywhere else.

Each case runs in a fresh interpreter, because an import happens once per process.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MATCHING = """
    import torch
    library = torch.library.Library("torchvision", "DEF")   # what a loaded _C library does
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    imported = True
"""
MISMATCHED = """
    import torch, torchvision.leftover
    if not hasattr(torch.ops.torchvision, "nms"):
        raise RuntimeError("operator torchvision::nms does not exist")
    torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: dets)
    torch.library.register_fake("torchvision::qnms")(lambda dets, scores, threshold: dets)
"""
OTHER_ERROR = """
    raise RuntimeError("PyTorch and torchvision were compiled for different CUDA versions")
"""
NEEDS_SOMETHING_ABSENT = """
    import a_package_that_is_not_installed
"""


def run(code: str, first_on_path: Path | None = None) -> str:
    """Run `code` in a fresh interpreter and return what it printed; fail with its error if any."""
    paths = [str(path) for path in (first_on_path, ROOT) if path is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT.anchor,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def stub(tmp_path):
    """A function that puts a package named torchvision, with the given source, on a path."""

    def make(source: str) -> Path:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(source))
        (package / "leftover.py").write_text("loads = globals().get('loads', 0) + 1\n")
        return tmp_path

    return make


def test_what_is_installed_here_works_with_timm_and_transformers():
    out = run(
        """
        from mmdd._torchvision import ensure_torchvision
        ensure_torchvision()
        ensure_torchvision()
        import torch, torchvision, timm, transformers
        with torch.no_grad():
            image = timm.create_model("test_nfnet", num_classes=0).eval()
            print(image(torch.zeros(1, 3, 64, 64)).isfinite().all().item())
            config = transformers.BertConfig(
                vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16)
            text = transformers.BertModel(config).eval()
            print(tuple(text(torch.zeros(2, 5, dtype=torch.long)).last_hidden_state.shape))
        """
    )
    assert out.split("\n")[:2] == ["True", "(2, 5, 16)"]


def test_the_installed_pair_is_repaired_exactly_when_it_is_broken():
    """Whatever pair of builds is installed, the repair is used if and only if it is needed."""
    broken = run(
        """
        try:
            import torchvision
            print("fine")
        except RuntimeError as error:
            print(error)
        """
    ).strip()
    repaired = run(
        """
        from mmdd import _torchvision
        _torchvision.ensure_torchvision()
        print(bool(_torchvision._declared))
        """
    ).strip()
    assert broken in ("fine", "operator torchvision::nms does not exist")
    assert repaired == str(broken != "fine")


def test_a_pair_that_does_not_match_is_repaired_and_the_half_import_forgotten(stub):
    out = run(
        """
        from mmdd import _torchvision
        _torchvision.ensure_torchvision()
        _torchvision.ensure_torchvision()
        import sys, torch, torchvision
        assert sys.modules["torchvision"] is torchvision
        assert torchvision.leftover is sys.modules["torchvision.leftover"]
        print(len(_torchvision._declared), hasattr(torch.ops.torchvision, "qnms"))
        """,
        stub(MISMATCHED),
    )
    assert out.split() == ["1", "True"]


def test_a_matching_pair_is_left_alone(stub):
    out = run(
        """
        import torchvision
        from mmdd import _torchvision
        _torchvision.ensure_torchvision()
        import sys
        assert sys.modules["torchvision"] is torchvision
        print(torchvision.imported, _torchvision._declared)
        """,
        stub(MATCHING),
    )
    assert out.split() == ["True", "[]"]


def test_an_absent_torchvision_is_no_error():
    out = run(
        """
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "torchvision":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        from mmdd import _torchvision
        _torchvision.ensure_torchvision()
        print("torchvision" in sys.modules, "torch" in sys.modules, _torchvision._declared)
        """
    )
    assert out.split() == ["False", "False", "[]"]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (OTHER_ERROR, "RuntimeError", "different CUDA versions"),
        (NEEDS_SOMETHING_ABSENT, "ModuleNotFoundError", "a_package_that_is_not_installed"),
    ],
)
def test_any_other_error_passes_through(stub, source, kind, message):
    out = run(
        """
        from mmdd import _torchvision
        try:
            _torchvision.ensure_torchvision()
        except Exception as error:
            print(type(error).__name__, error, _torchvision._declared)
        """,
        stub(source),
    )
    assert out.startswith(kind)
    assert message in out
    assert out.strip().endswith("[]"), "nothing is declared on top of another fault"


def test_importing_the_package_is_quick_and_brings_in_neither():
    out = run(
        """
        import sys
        import mmdd
        print([name for name in ("torch", "torchvision", "timm") if name in sys.modules])
        """
    )
    assert out.strip() == "[]"
