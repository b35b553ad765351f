"""Scenes: the embedded dataset, small rendered pictures of shapes with five captions each.

Deterministic from a seed on any machine. Two rules make that so: random numbers come from
`Generator.random` alone (53 raw bits, no library-dependent transform), and rendering uses only
operations that IEEE 754 rounds exactly (+ - * / sqrt, comparisons), never sin, cos or exp, whose
last bit differs between processors.
"""

import itertools
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmdd.data.captions import caption_scene
from mmdd.data.pairs import PairDataset
from mmdd.errors import DataError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.96, 0.88, 0.20),
    "green": (0.16, 0.65, 0.22),
    "blue": (0.16, 0.34, 0.88),
    "purple": (0.56, 0.20, 0.70),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}
SIZES = {"small": 0.135, "large": 0.22}  # radius as a share of the picture's width
TEXTURES = ("solid", "striped", "dotted")
TEXTURE_SHARE = (0.50, 0.25, 0.25)
_TEXTURE_EDGES = list(itertools.accumulate(TEXTURE_SHARE))
HUES = {
    "grey": (0.55, 0.55, 0.56),
    "beige": (0.82, 0.74, 0.58),
    "teal": (0.35, 0.66, 0.64),
    "navy": (0.16, 0.20, 0.36),
    "pink": (0.93, 0.70, 0.76),
    "olive": (0.47, 0.48, 0.22),
}
PATTERNS = ("plain", "gradient", "checkered", "speckled")
_COLOUR_NAMES, _SIZE_NAMES, _HUE_NAMES = tuple(COLOURS), tuple(SIZES), tuple(HUES)
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) of a 2 × 2 grid
CAPTIONS_PER_IMAGE = 5

# Every scene belongs to one part of the space of scenes, by a hash of its description: scenes of
# different splits are never alike, whatever their numbers and seeds.
_SPLIT_CLASSES = {"pretrain": (0, 1, 2, 3), "train": (4, 5), "val": (6,), "test": (7,)}
_STREAM = {"pretrain": 0, "train": 1, "val": 2, "test": 3}


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes by name, and where it stands on the grid as (row, column)."""

    shape: str
    colour: str
    size: str
    texture: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """What a picture shows before the jitter: two or three objects on a background."""

    hue: str
    pattern: str
    objects: tuple[SceneObject, ...]


class Scenes:
    """The embedded dataset. Book: notebooks/01_data."""

    @staticmethod
    def generate(
        split_sizes: Mapping[str, int] | None = None, size: int = 32, seed: int = 0
    ) -> PairDataset:
        """Render a dataset: by default 4,000 train, 300 val and 300 test scenes.

        split_sizes: number of scenes by split, out of train, val, test and pretrain (a corpus that
        shares no scene with the others). size: width and height in pixels, at least 8. The bytes
        depend on the arguments only; a split does not change when another one's size does.

        Raises `DataError` for an unknown split, a negative number, or a size below 8.
        Book: notebooks/01_data.
        """
        sizes = dict(split_sizes or {"train": 4000, "val": 300, "test": 300})
        if size < 8:
            raise DataError(f"Scenes need at least 8 pixels a side to be told apart, not {size}.")
        images, captions, splits, start = [], [], {}, 0
        for split, count in sizes.items():
            scenes = Scenes.describe(split, count, seed)
            images.append(render(scenes, size, (seed, _STREAM[split])))
            for index, scene in enumerate(scenes):
                rng = np.random.default_rng([seed, _STREAM[split], index, 2])
                captions.append([caption_scene(scene, rng) for _ in range(CAPTIONS_PER_IMAGE)])
            splits[split] = np.arange(start, start + count)
            start += count
        return PairDataset(
            np.concatenate(images),
            captions,
            splits,
            name="scenes",
            metadata={
                "source": "rendered by mmdd.data.scenes",
                "licence": "MIT",
                "seed": seed,
                "size": size,
            },
        )

    @staticmethod
    def describe(split: str, count: int, seed: int = 0) -> list[Scene]:
        """The scenes of a split before rendering, with every attribute by name."""
        if split not in _SPLIT_CLASSES:
            raise DataError(
                f"Scenes have no split {split!r}; they have " + ", ".join(_SPLIT_CLASSES) + "."
            )
        if count < 0:
            raise DataError(f"the number of {split} scenes must not be negative, not {count}.")
        rng = np.random.default_rng([seed, _STREAM[split]])
        scenes: list[Scene] = []
        seen: set[Scene] = set()
        while len(scenes) < count:
            scene = _draw_scene(rng)
            part = zlib.crc32(repr(scene).encode()) % 8
            if part in _SPLIT_CLASSES[split] and scene not in seen:
                seen.add(scene)
                scenes.append(scene)
        return scenes


def _draw_scene(rng: np.random.Generator) -> Scene:
    u = rng.random(24).tolist()  # a fixed number of draws per scene keeps the stream easy to follow
    count = 2 + int(u[0] * 2)
    cells = list(CELLS)
    objects = []
    for k in range(count):
        v = u[6 + 5 * k : 11 + 5 * k]
        objects.append(
            SceneObject(
                shape=_pick(SHAPES, v[0]),
                colour=_pick(_COLOUR_NAMES, v[1]),
                size=_pick(_SIZE_NAMES, v[2]),
                texture=TEXTURES[bisect_right(_TEXTURE_EDGES, v[3])],
                cell=cells.pop(int(v[4] * len(cells))),
            )
        )
    objects.sort(key=lambda o: o.cell)
    return Scene(_pick(_HUE_NAMES, u[1]), _pick(PATTERNS, u[2]), tuple(objects))


def _pick(options: tuple[str, ...], u: float) -> str:
    return options[int(u * len(options))]


def render(scenes: list[Scene], size: int, stream: tuple[int, ...] = (0,)) -> np.ndarray:
    """Draw scenes: (n, size, size, 3) uint8. `stream` seeds jitter and pixel noise.

    Objects are antialiased from signed distances, slightly moved, rotated, scaled and recoloured.
    Book: notebooks/01_data.
    """
    out = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    block = max(1, (1 << 18) // (size * size))  # bounds the temporary arrays to some megabytes
    for start in range(0, len(scenes), block):
        out[start : start + block] = _render_block(
            scenes[start : start + block], size, stream, start
        )
    return out


def _render_block(
    scenes: list[Scene], size: int, stream: tuple[int, ...], first: int
) -> np.ndarray:
    n = len(scenes)
    jitter = np.empty((n, 64))
    noise = np.empty((n, size, size, 3))
    for i in range(n):
        rng = np.random.default_rng([*stream, first + i, 1])
        jitter[i] = rng.random(64)
        two = rng.random((2, size, size, 3))
        np.add(two[0], two[1], out=noise[i])
    noise -= 1.0
    centre = (np.arange(size) + 0.5) / size
    y, x = np.broadcast_to(centre[:, None], (size, size)), np.broadcast_to(centre, (size, size))

    canvas = _backgrounds(scenes, x, y, jitter[:, :16], noise)
    for slot in range(3):
        for shape in SHAPES:
            rows = [
                i
                for i, scene in enumerate(scenes)
                if len(scene.objects) > slot and scene.objects[slot].shape == shape
            ]
            if rows:
                objects = [scenes[i].objects[slot] for i in rows]
                u = jitter[rows, 16 + 16 * slot : 32 + 16 * slot]
                canvas[rows] = _paint(canvas[rows], shape, objects, x, y, u, size)
    canvas += 0.03 * noise
    return np.floor(np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _backgrounds(
    scenes: list[Scene], x: np.ndarray, y: np.ndarray, u: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    base = np.array([HUES[scene.hue] for scene in scenes]) + 0.08 * (u[:, 0:3] - 0.5)
    shade = np.zeros((len(scenes), *x.shape))
    for i, scene in enumerate(scenes):
        if scene.pattern == "gradient":
            across, down = u[i, 4] - 0.5, u[i, 5] - 0.5
            length = np.sqrt(across * across + down * down) + 1e-6
            shade[i] = 0.45 * (across * (x - 0.5) + down * (y - 0.5)) / length
        elif scene.pattern == "checkered":
            phase_x, phase_y = u[i, 4], u[i, 5]
            odd = (np.floor(8 * x + phase_x) + np.floor(8 * y + phase_y)) % 2
            shade[i] = 0.16 * (odd - 0.5)
        elif scene.pattern == "speckled":
            shade[i] = np.where(noise[i, :, :, 0] > 0.55, 0.22, 0.0)
    return base[:, None, None, :] + shade[..., None]


def _paint(
    canvas: np.ndarray,
    shape: str,
    objects: list[SceneObject],
    x: np.ndarray,
    y: np.ndarray,
    u: np.ndarray,
    size: int,
) -> np.ndarray:
    """Composite one object per picture: canvas (k, S, S, 3) with objects of one shape."""

    def column(values: np.ndarray) -> np.ndarray:
        return values[:, None, None]

    radius = np.array([SIZES[o.size] for o in objects]) * (0.92 + 0.16 * u[:, 0])
    # The jitter keeps an object inside its cell's half of the picture.
    room = 0.25 - radius
    centre_x = np.array([0.25 + 0.5 * o.cell[1] for o in objects]) + room * (2 * u[:, 1] - 1)
    centre_y = np.array([0.25 + 0.5 * o.cell[0] for o in objects]) + room * (2 * u[:, 2] - 1)
    # A rotation by 2·arctan(t) without trigonometric functions: |t| ≤ 0.13 is up to 15 degrees.
    t = 0.26 * (u[:, 3] - 0.5)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    dx = (x - column(centre_x)) / column(radius)
    dy = (column(centre_y) - y) / column(radius)  # upwards, in units of the radius
    px = column(cosine) * dx + column(sine) * dy
    py = column(cosine) * dy - column(sine) * dx

    distance = _signed_distance(shape, px, py) * column(radius) * size  # in pixels
    alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None]

    colour = np.array([COLOURS[o.colour] for o in objects]) + 0.12 * (u[:, 4:7] - 0.5)
    ink = np.broadcast_to(colour[:, None, None, :], canvas.shape).copy()
    # Textures are drawn in a mix of the colour and its opposite in lightness.
    light = (colour.sum(axis=1) > 1.8)[:, None]
    second = np.where(light, 0.45 * colour, 0.45 * colour + 0.55)
    phase = u[:, 7]
    for i, item in enumerate(objects):
        if item.texture == "striped":
            marked = np.floor(px[i] * 2.2 + 2 * phase[i]) % 2 == 0
        elif item.texture == "dotted":
            gx = px[i] * 1.7 + phase[i]
            gy = py[i] * 1.7 + phase[i]
            fx, fy = gx - np.floor(gx) - 0.5, gy - np.floor(gy) - 0.5
            marked = fx * fx + fy * fy < 0.1
        else:
            continue
        ink[i][marked] = second[i]
    return canvas + alpha * (ink - canvas)


# Directions of a five-pointed star's five lines: cosine and sine of 90° + 72°·k, as literals.
_STAR = (
    (0.0, 1.0),
    (-0.9510565162951535, 0.3090169943749474),
    (-0.5877852522924731, -0.8090169943749475),
    (0.5877852522924731, -0.8090169943749475),
    (0.9510565162951535, 0.3090169943749474),
)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline in units of the radius, negative inside (exact or close to it)."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.92
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.78
    if shape == "triangle":
        return np.maximum(0.8660254037844386 * np.abs(x) + 0.5 * (y + 0.15), -(y + 0.15)) - 0.55
    if shape == "star":
        # A pentagram is where at most one of its five lines is crossed: the second largest decides.
        sides = np.stack([-(cx * x + sy * y) for cx, sy in _STAR])
        return np.sort(sides, axis=0)[-2] - 0.36
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.maximum(np.minimum(ax, ay) - 0.30, np.maximum(ax, ay) - 0.92)
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.70) - 0.24
    if shape == "diamond":
        return (1.45 * np.abs(x) + np.abs(y) - 1.0) / 1.7613914953808536
    if shape == "heart":
        ax = np.abs(x)
        lobe = np.sqrt((ax - 0.42) * (ax - 0.42) + (y - 0.34) * (y - 0.34)) - 0.48
        point = (ax + np.abs(y + 0.02)) / 1.4142135623730951 - 0.63
        return np.minimum(lobe, np.where(y < 0.36, point, 1.0))
    raise DataError(f"no such shape: {shape!r}.")
