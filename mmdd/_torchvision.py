"""Make torchvision importable beside a torch of another build, in this one place.

The package index serves torchvision as a CUDA build. Beside a CPU-only torch its compiled library
cannot load, so the operators that its Python files refer to are missing and `import torchvision`
ends in a RuntimeError; timm and transformers, which import it, then fail too. This project uses
none of those operators, so declaring them is enough.
"""

import importlib
import sys
import threading

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_lock = threading.Lock()
_declared: list[object] = []  # torch forgets the schemas when the Library object is collected


def ensure_torchvision() -> None:
    """Import torchvision if it is installed, repairing the import beside a torch of another build.

    Call it before the first import of timm or transformers. Does nothing more than the import when
    the two builds match, nothing at all when torchvision is not installed, and nothing on a second
    call. Any other error that torchvision raises while it is imported passes through unchanged.

    Book: notebooks/02_encoders_and_evaluation.
    """
    with _lock:
        try:
            importlib.import_module("torchvision")
        except ModuleNotFoundError as error:
            if error.name != "torchvision":
                raise
        except RuntimeError as error:
            if _MISSING_OPERATOR not in str(error) or _declared:
                raise
            _forget_half_import()
            _declare_operators()
            importlib.import_module("torchvision")


def _forget_half_import() -> None:
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]


def _declare_operators() -> None:
    from torch.library import Library

    library = Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
