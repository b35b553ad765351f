"""Scenes: the same bytes everywhere, disjoint splits, and captions that are true of their scene."""

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmdd.data.captions import MAX_WORDS, VOCABULARY
from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import (
    CELLS,
    COLOURS,
    HUES,
    PATTERNS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    Scenes,
    render,
)
from mmdd.errors import DataError

SPLITS = ("pretrain", "train", "val", "test")


def digest(value: np.ndarray | list) -> str:
    content = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# -- determinism -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "seed", "pixels", "words"),
    [
        (32, 0, "7dcf07c4e41279c7", "8a8856fdf7d71884"),
        (64, 0, "7e8e52ce0be7a2f6", "8a8856fdf7d71884"),
        (32, 7, "a2511df0a9580326", "40f8a8f4bc1dbc43"),
    ],
)
def test_the_bytes_are_the_same_on_every_machine(
    size: int, seed: int, pixels: str, words: str
) -> None:
    data = Scenes.generate({"pretrain": 4, "train": 16, "val": 4, "test": 4}, size, seed)
    assert data.images.shape == (28, size, size, 3)
    assert digest(data.images) == pixels
    assert digest(data.captions) == words


def test_scenes_do_not_depend_on_the_block_they_are_drawn_in() -> None:
    scenes = Scenes.describe("train", 300)
    many = render(scenes, 32, (0, 1))  # 256 pictures of this size make a block
    alone = render(scenes[:5], 32, (0, 1))
    assert np.array_equal(many[:5], alone)
    assert np.array_equal(Scenes.generate({"train": 300}).images, many)


def test_a_split_does_not_depend_on_the_others() -> None:
    both = Scenes.generate({"train": 20, "test": 7}, seed=3)
    alone = Scenes.generate({"test": 7}, seed=3)
    longer = Scenes.generate({"test": 12, "train": 4}, seed=3)
    for data in (alone, longer):
        expected, found = both.indices("test"), data.indices("test")[:7]
        assert np.array_equal(both.images[expected], data.images[found])
        assert [both.captions[i] for i in expected] == [data.captions[i] for i in found]
    assert longer.captions[12:] == both.captions[:4]


def test_seeds_differ() -> None:
    a, b = Scenes.describe("train", 50, 0), Scenes.describe("train", 50, 1)
    assert a == Scenes.describe("train", 50, 0)
    assert len(set(a) & set(b)) < 3


def test_the_default() -> None:
    data = Scenes.generate(size=8)
    assert {split: len(members) for split, members in data.splits.items()} == {
        "train": 4000,
        "val": 300,
        "test": 300,
    }
    assert data.metadata["licence"] == "MIT"
    assert data.name == "scenes"
    assert {len(texts) for texts in data.captions} == {5}


def test_no_scene_is_in_two_splits_whatever_the_seeds() -> None:
    found: dict[str, set[Scene]] = {}
    for split in SPLITS:
        for seed in (0, 1, 2):
            scenes = Scenes.describe(split, 1500, seed)
            assert len(set(scenes)) == 1500  # nor twice in one
            found.setdefault(split, set()).update(scenes)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not found[one] & found[other]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (({"dev": 3},), "no split 'dev'; they have pretrain, train, val, test"),
        (({"train": -1},), "the number of train scenes must not be negative, not -1"),
        (({"train": 3}, 7), "at least 8 pixels"),
    ],
)
def test_errors(arguments: tuple, named: str) -> None:
    with pytest.raises(DataError, match=named):
        Scenes.generate(*arguments)


def test_an_empty_split_is_possible() -> None:
    data = Scenes.generate({"train": 2, "val": 0})
    assert len(data.indices("val")) == 0
    assert len(data) == 2


# -- what is drawn ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return Scenes.describe("train", 2000)


@pytest.fixture(scope="module")
def data() -> PairDataset:
    return Scenes.generate({"train": 2000}, size=8)


def test_the_space_of_scenes(scenes: list[Scene]) -> None:
    objects = [item for scene in scenes for item in scene.objects]
    for name, values in (
        ("shape", SHAPES),
        ("colour", COLOURS),
        ("size", SIZES),
        ("texture", TEXTURES),
        ("cell", CELLS),
    ):
        share = Counter(getattr(item, name) for item in objects)
        assert set(share) == set(values)
        expected = {"solid": 0.5, "striped": 0.25, "dotted": 0.25}
        for value, count in share.items():
            wanted = expected.get(value, 1 / len(values))
            assert abs(count / len(objects) - wanted) < 0.25 * wanted, (name, value)
    assert {scene.hue for scene in scenes} == set(HUES)
    assert {scene.pattern for scene in scenes} == set(PATTERNS)
    assert 0.45 < np.mean([len(scene.objects) == 2 for scene in scenes]) < 0.55
    for scene in scenes:
        cells = [item.cell for item in scene.objects]
        assert cells == sorted(set(cells))


def quadrant(item: SceneObject, size: int) -> tuple[slice, slice]:
    half = size // 2
    (row, column) = item.cell
    return slice(row * half, (row + 1) * half), slice(column * half, (column + 1) * half)


@pytest.mark.parametrize("size", [32, 64])
def test_objects_are_drawn_in_their_cell_and_colour(scenes: list[Scene], size: int) -> None:
    some = scenes[:200]
    full = render(some, size).astype(int)
    without = render([replace(s, objects=s.objects[:-1]) for s in some], size).astype(int)
    for scene, picture, rest in zip(some, full, without, strict=True):
        item = scene.objects[-1]
        changed = np.abs(picture - rest).max(axis=2) > 0
        inside = changed[quadrant(item, size)]
        # The tip of a star may reach over the border by a pixel.
        assert inside.sum() >= 0.95 * changed.sum() > 0
        area = inside.mean() * 0.25 / (np.pi * SIZES[item.size] ** 2)  # of the round outline
        assert 0.2 < area < 1.6, item
    for scene, picture in zip(some, full, strict=True):
        for item in scene.objects:
            pixels = picture[quadrant(item, size)].reshape(-1, 3) / 255
            distance = np.abs(pixels - np.array(COLOURS[item.colour])).max(axis=1)
            assert (distance < 0.12).sum() >= 3, item


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "texture"])
def test_every_attribute_is_visible(scenes: list[Scene], attribute: str) -> None:
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}[attribute]
    scene = next(s for s in scenes if s.objects[0].texture == "solid")
    variants = [
        replace(scene, objects=(replace(scene.objects[0], **{attribute: v}), *scene.objects[1:]))
        for v in values
    ]
    # One call each: the jitter and the noise depend on a picture's place in the list.
    pictures = [render([variant], 32)[0].astype(int) for variant in variants]
    for one, other in itertools.combinations(pictures, 2):
        assert (np.abs(one - other).max(axis=2) > 25).sum() >= 5


def test_backgrounds(scenes: list[Scene]) -> None:
    for hue, rgb in HUES.items():
        plain = Scene(hue, "plain", ())
        picture = render([plain], 32)[0] / 255
        assert np.abs(picture.mean(axis=(0, 1)) - np.array(rgb)).max() < 0.05
        deviations = [
            (render([replace(plain, pattern=p)], 32)[0] / 255).std(axis=(0, 1)).max()
            for p in PATTERNS
        ]
        assert deviations[0] < 0.02
        assert min(deviations[1:]) > 2 * deviations[0]


# -- what is said: an independent reading of the captions ------------------------------------------

WORDS = {
    "shape": {
        "circle": "circle", "disc": "circle", "square": "square", "box": "square",
        "triangle": "triangle", "star": "star", "cross": "cross", "plus": "cross",
        "ring": "ring", "hoop": "ring", "diamond": "diamond", "rhombus": "diamond",
        "heart": "heart", "shape": None, "thing": None, "object": None,
    },
    "size": {
        "small": "small", "little": "small", "tiny": "small",
        "large": "large", "big": "large", "huge": "large",
    },
    "texture": {
        "solid": "solid", "striped": "striped", "stripy": "striped",
        "dotted": "dotted", "spotted": "dotted",
    },
    "colour": {c: c for c in
               ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")},
}  # fmt: skip
PATTERN_WORDS = {
    "plain": "plain", "shaded": "gradient", "gradient": "gradient",
    "checkered": "checkered", "chequered": "checkered",
    "speckled": "speckled", "grainy": "speckled",
}  # fmt: skip
HUE_WORDS = ("grey", "beige", "teal", "navy", "pink", "olive")


def options(words: object) -> str:
    return "(?:" + "|".join(words) + ")"  # type: ignore[arg-type]


OBJECT = (
    rf"an? (?:{options(WORDS['size'])} )?(?:{options(WORDS['texture'])} )?"
    rf"(?:{options(WORDS['colour'])} )?{options(WORDS['shape'])}"
)
GROUND = rf"an? (?:{options(PATTERN_WORDS)} )?{options(HUE_WORDS)} (?:background|ground)"
CORNER = "(?:in|at) the (upper|top|lower|bottom) (left|right)(?: corner)?"
RELATIONS = {
    "to the left of": lambda a, b: a.cell[1] < b.cell[1],
    "left of": lambda a, b: a.cell[1] < b.cell[1],
    "to the right of": lambda a, b: a.cell[1] > b.cell[1],
    "right of": lambda a, b: a.cell[1] > b.cell[1],
    "above": lambda a, b: a.cell[0] < b.cell[0],
    "higher than": lambda a, b: a.cell[0] < b.cell[0],
    "below": lambda a, b: a.cell[0] > b.cell[0],
    "under": lambda a, b: a.cell[0] > b.cell[0],
}
FORMS = {
    "list": rf"({OBJECT})(?: , ({OBJECT}))* and ({OBJECT})",
    "beside": rf"({OBJECT}) (?:next to|with) ({OBJECT})",
    "relation": rf"({OBJECT}) ({options(RELATIONS)}) ({OBJECT})",
    "ground": rf"({OBJECT}) (?:on|over) ({GROUND})",
    "corner ground": rf"({OBJECT}) {CORNER} on ({GROUND})",
    "count": rf"(two|a pair of|three) (?:shapes|things|objects) , one is ({OBJECT})",
    "corner": rf"(?:a picture of|there is|i see) ({OBJECT}) {CORNER} and ({OBJECT})",
}


def form_of(caption: str) -> str:
    fitting = [name for name, form in FORMS.items() if re.fullmatch(form, caption)]
    assert len(fitting) == 1, (caption, fitting)
    return fitting[0]


def fits(item: SceneObject, phrase: str) -> bool:
    for word in phrase.split()[1:]:
        for attribute, table in WORDS.items():
            if word in table and table[word] not in (None, getattr(item, attribute)):
                return False
    return True


def in_corner(item: SceneObject, caption: str) -> bool:
    found = re.search(CORNER, caption)
    assert found is not None
    row = 0 if found[1] in ("upper", "top") else 1
    return item.cell == (row, 0 if found[2] == "left" else 1)


def ground_is_true(scene: Scene, caption: str) -> bool:
    found = re.search(GROUND, caption)
    assert found is not None
    words = found[0].split()[1:-1]
    patterns = [PATTERN_WORDS[w] for w in words if w in PATTERN_WORDS]
    return words[-1] == scene.hue and patterns in ([], [scene.pattern])


def is_true(scene: Scene, caption: str) -> bool:
    form = form_of(caption)
    phrases = re.findall(OBJECT, caption)
    if form == "list" and len(phrases) > 2 and len(phrases) != len(scene.objects):
        return False
    if "ground" in form and not ground_is_true(scene, caption):
        return False
    if form == "count" and (3 if caption.startswith("three") else 2) != len(scene.objects):
        return False
    relation = (lambda a, b: True) if form != "relation" else None
    if relation is None:
        found = re.fullmatch(FORMS["relation"], caption)
        assert found is not None
        relation = RELATIONS[found[2]]
    for chosen in itertools.permutations(scene.objects, len(phrases)):
        if not all(fits(item, phrase) for item, phrase in zip(chosen, phrases, strict=True)):
            continue
        if "corner" in form and not in_corner(chosen[0], caption):
            continue
        if len(chosen) < 2 or relation(*chosen[:2]):
            return True
    return False


def test_every_caption_is_true(scenes: list[Scene], data: PairDataset) -> None:
    for scene, captions in zip(scenes, data.captions, strict=True):
        for caption in captions:
            assert is_true(scene, caption), (scene, caption)


def test_captions_are_mostly_false_of_another_scene(scenes: list[Scene], data: PairDataset) -> None:
    """The reading above is able to say no, and captions tell scenes apart."""
    others = [*scenes[1:], scenes[0]]
    wrong = [
        is_true(scene, caption)
        for scene, captions in zip(others, data.captions, strict=True)
        for caption in captions
    ]
    assert np.mean(wrong) < 0.1


def test_every_form_and_attribute_is_used(data: PairDataset) -> None:
    captions = [c for texts in data.captions for c in texts]
    shares = Counter(form_of(caption) for caption in captions)
    assert set(shares) == set(FORMS)
    assert min(shares.values()) > 0.03 * len(captions)
    phrases = [p for caption in captions for p in re.findall(OBJECT, caption)]
    for attribute, table in WORDS.items():
        named = [
            any(table.get(word) is not None for word in phrase.split()[1:]) for phrase in phrases
        ]
        low, high = {"size": (0.3, 0.6), "texture": (0.3, 0.6)}.get(attribute, (0.8, 0.97))
        assert low < np.mean(named) < high, attribute
    # Few captions name everything, or nobody would need more than one.
    assert np.mean([len(set(texts)) == 5 for texts in data.captions]) > 0.9


def test_the_vocabulary_is_closed(data: PairDataset) -> None:
    words = Counter(w for texts in data.captions for caption in texts for w in caption.split())
    assert set(words) == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    longest = max(len(caption.split()) for texts in data.captions for caption in texts)
    assert longest <= MAX_WORDS == 20
    assert all(c == c.lower() for texts in data.captions for c in texts)


def test_articles(data: PairDataset) -> None:
    for texts in data.captions:
        for caption in texts:
            for article, following in re.findall(r"\b(an?) (\w)", caption):
                assert article == ("an" if following in "aeiou" else "a"), caption
