"""What a wrong configuration was probably meant to be: errors with whole paths and near matches."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Path = tuple[str | int, ...]


def suggestion(word: object, known: Iterable[str], most: int = 1) -> str:
    """The end of an error message: "; did you mean …?", or nothing where no name is near.

    most: the largest number of names to offer, the nearest first.
    """
    names = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(str(word).casefold(), names, n=most, cutoff=0.5)
    offered = " or ".join(repr(names[name]) for name in found)
    return f"; did you mean {offered}?" if found else ""


def fault(path: Path, message: str, given: Any, kind: str = "value_error") -> InitErrorDetails:
    """One line of a validation error. path: of the field, from the root."""
    # A template has no literal braces; a custom error puts values in for names.
    error = PydanticCustomError(kind, "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=path, input=given)


def faults(
    model: type[BaseModel], error: ValidationError, below: Path = ()
) -> list[InitErrorDetails]:
    """The lines of a validation error of `model`, with near matches, placed below a path.

    A misspelt key gets the nearest field of its model, a value that is none of those allowed the
    nearest of them.
    """
    found = []
    for line in error.errors():
        path, message = tuple(line["loc"]), line["msg"].removeprefix("Value error, ")
        if "did you mean" not in message:
            if line["type"] == "extra_forbidden":
                owner = _model_at(model, path[:-1])
                message += suggestion(path[-1], owner.model_fields if owner else ())
            elif line["type"] == "literal_error":
                allowed = re.findall(r"'([^']*)'", line["ctx"]["expected"])
                message += suggestion(line["input"], allowed)
        found.append(fault((*below, *path), message, line["input"], line["type"]))
    return found


def refuse(model: type[BaseModel], found: list[InitErrorDetails]) -> None:
    """Raise `ValidationError` for the faults that were found, if any."""
    if found:
        raise ValidationError.from_exception_data(model.__name__, found)


def not_finite(values: Any, below: Path = ()) -> Iterator[InitErrorDetails]:
    """A fault for each number in nested values that is NaN or infinite."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from not_finite(value, (*below, key))
    elif isinstance(values, float) and not math.isfinite(values):
        yield fault(below, "Input should be a finite number", values, "finite_number")


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model that stands at a path of fields, where the annotations tell."""
    owner: type[BaseModel] | None = model
    for name in path:
        field = owner.model_fields.get(str(name)) if owner else None
        if field is None:
            return None
        kinds = (field.annotation, *get_args(field.annotation))
        owner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return owner
