"""JSON objects that carry their own checksum, so that a flipped bit is an error, not a value."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "sha256"


def canonical(values: Mapping[str, Any]) -> str:
    """A JSON object as text that is the same before and after a file; its checksum left out."""
    plain = {name: value for name, value in values.items() if name != CHECKSUM}
    # Through JSON once before sorting: there and back, integer keys turn into strings.
    return json.dumps(json.loads(json.dumps(plain)), sort_keys=True)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of everything else in it, for `unsealed`."""
    return {**values, CHECKSUM: hashlib.sha256(canonical(values).encode()).hexdigest()}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed` was given. Raises `ValueError` where the checksum is missing or another."""
    plain = {name: value for name, value in values.items() if name != CHECKSUM}
    if sealed(plain)[CHECKSUM] != values.get(CHECKSUM):
        raise ValueError("its checksum does not match its content")
    return plain
