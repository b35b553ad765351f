"""More small encoders of Scenes, for the question how a set fares with other architectures."""

from collections.abc import Callable

from torch import nn

ENCODERS: dict[str, dict[str, Callable[[], nn.Module]]] = {"image": {}, "text": {}}
