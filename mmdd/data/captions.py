"""What a person might say of a scene: captions that each name only a part of it.

A caption follows one of seven templates and mentions an attribute only sometimes, in one of its
synonyms. The whole vocabulary is `VOCABULARY`; no caption is longer than `MAX_WORDS` words.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmdd.data.scenes import Scene, SceneObject

MAX_WORDS = 20

_SHAPE_WORDS = {
    "circle": ("circle", "disc", "circle"),
    "square": ("square", "box", "square"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus", "cross"),
    "ring": ("ring", "hoop", "ring"),
    "diamond": ("diamond", "rhombus", "diamond"),
    "heart": ("heart",),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_TEXTURE_WORDS = {
    "solid": ("solid",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
}
_PATTERN_WORDS = {
    "plain": ("plain",),
    "gradient": ("shaded", "gradient"),
    "checkered": ("checkered", "chequered"),
    "speckled": ("speckled", "grainy"),
}
_THING = ("shape", "thing", "object")
_COUNT = {2: ("two", "a pair of"), 3: ("three",)}
_ROW = (("upper", "top"), ("lower", "bottom"))
_COLUMN = ("left", "right")
# How often an attribute of an object is mentioned.
_MENTION = {"size": 0.45, "texture": 0.50, "colour": 0.88, "shape": 0.92, "background": 0.7}

# How often each of the seven templates is used, as upper edges of a uniform number: those that
# name two objects or more come more often.
_TEMPLATE_EDGES = (0.20, 0.42, 0.52, 0.60, 0.68, 0.84)


def caption_scene(scene: Scene, rng: np.random.Generator) -> str:
    """One caption in lower case, without punctuation but commas. Book: notebooks/01_data."""
    say = _Speaker(rng)
    order = sorted(scene.objects, key=lambda _: rng.random())
    first, second = order[0], order[1]
    template = bisect_right(_TEMPLATE_EDGES, rng.random())
    if template == 0:
        joint = say.one("and", "next to", "with")
        return f"{say.object(first)} {joint} {say.object(second)}"
    if template == 1:
        return f"{say.object(first)} {say.relation(first, second)} {say.object(second)}"
    if template == 2:
        return f"{say.object(first)} {say.one('on', 'over')} {say.background(scene)}"
    if template == 3:
        return f"{say.object(first)} {say.corner(first)} on {say.background(scene)}"
    if template == 4:
        things = say.one("shapes", "things", "objects")
        count = say.one(*_COUNT[len(scene.objects)])
        return f"{count} {things} , one is {say.object(first)}"
    if template == 5:
        parts = [say.object(item) for item in order]
        return " , ".join(parts[:-1]) + f" and {parts[-1]}"
    return (
        f"{say.one('a picture of', 'there is', 'i see')} {say.object(first)} "
        f"{say.corner(first)} and {say.object(second)}"
    )


class _Speaker:
    """Draws words; every choice takes exactly one random number, so that streams stay simple."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one(self, *options: str) -> str:
        return options[int(self.rng.random() * len(options))]

    def mentions(self, attribute: str) -> bool:
        return bool(self.rng.random() < _MENTION[attribute])

    def object(self, item: SceneObject) -> str:
        words = []
        for attribute, table in (("size", _SIZE_WORDS), ("texture", _TEXTURE_WORDS)):
            word = self.one(*table[getattr(item, attribute)])
            if self.mentions(attribute):
                words.append(word)
        if self.mentions("colour"):
            words.append(item.colour)
        shape, thing = self.one(*_SHAPE_WORDS[item.shape]), self.one(*_THING)
        words.append(shape if self.mentions("shape") else thing)
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    def relation(self, a: SceneObject, b: SceneObject) -> str:
        options = []
        if a.cell[1] != b.cell[1]:
            side = _COLUMN[a.cell[1]]
            options += [f"to the {side} of", f"{side} of"]
        if a.cell[0] < b.cell[0]:
            options += ["above", "higher than"]
        if a.cell[0] > b.cell[0]:
            options += ["below", "under"]
        return self.one(*options)

    def corner(self, item: SceneObject) -> str:
        row, column = self.one(*_ROW[item.cell[0]]), _COLUMN[item.cell[1]]
        place = self.one("in the", "at the")
        return f"{place} {row} {column}" + self.one("", " corner")

    def background(self, scene: Scene) -> str:
        pattern = self.one(*_PATTERN_WORDS[scene.pattern])
        ground = self.one("background", "ground")
        words = ([pattern] if self.mentions("background") else []) + [scene.hue, ground]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


_OTHER_WORDS = """
a an and next to with on over , one is of the left right above higher than below under in at corner
background ground picture there i see shapes things objects pair two three upper top lower bottom
red orange yellow green blue purple white black grey beige teal navy pink olive
"""


def _vocabulary() -> tuple[str, ...]:
    words = set(_OTHER_WORDS.split()) | set(_THING)
    for table in (_SHAPE_WORDS, _SIZE_WORDS, _TEXTURE_WORDS, _PATTERN_WORDS):
        for synonyms in table.values():
            words.update(synonyms)
    return tuple(sorted(words))


VOCABULARY = _vocabulary()
