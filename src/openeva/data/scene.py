"""Pictures of objects on textured grounds: what one shows, in numbers, and how that looks.

(seed, index) -> `draw_scene` -> `Scene` -> `render` (pixels), `coverage` (masks), `scene_captions.captions_of` (texts)

A scene is described before it is drawn, front to back and without pixels, so that whatever else is wanted of it
(captions, boxes, object masks, semantic maps, moving clips) follows from the same description: `coverage` says which
share of each pixel an object fills, and a clip is a sequence of scenes whose objects have moved.
Coordinates: the picture is centred at (0, 0), its shorter side runs from -1 to 1, y grows downwards.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from openeva.data.sampler import seed_of

Array = npt.NDArray[np.float32]
Shape = Literal["disc", "square", "triangle", "star", "ring", "cross", "heart", "crescent"]
Pattern = Literal["plain", "stripes", "checks", "dots", "waves", "gradient"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (238, 137, 42),
    "yellow": (246, 209, 61),
    "green": (58, 157, 78),
    "cyan": (64, 196, 205),
    "blue": (47, 98, 204),
    "purple": (130, 71, 176),
    "pink": (240, 142, 178),
    "brown": (128, 84, 52),
    "white": (243, 243, 238),
    "grey": (128, 130, 134),
    "black": (28, 28, 32),
}


@dataclass(frozen=True)
class Texture:
    """A surface of two colours.

    Attributes:
        pattern: How the colours alternate.
        colours: Names in `COLOURS`, the main one first.
        period: Length after which the pattern repeats.
        angle: Direction of the pattern in radians.
        roughness: Standard deviation of the grain, as a share of full brightness.
    """

    pattern: Pattern
    colours: tuple[str, str]
    period: float
    angle: float
    roughness: float = 0.0


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        shape: Its outline.
        texture: Its surface, which turns with it.
        y: Row of its centre.
        x: Column of its centre.
        radius: Half of its extent.
        angle: Rotation in radians.
    """

    shape: Shape
    texture: Texture
    y: float
    x: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        ground: Surface behind everything.
        things: Objects, the hindmost first; the last is the main one, in front and larger than the others.
        light: Brightness gained from the upper left to the lower right corner, as a share of full brightness.
        grain_seed: Seed of the ground's grain.
    """

    ground: Texture
    things: tuple[Thing, ...]
    light: float
    grain_seed: int

    @property
    def label(self) -> int:
        """Shape of the main object, as its number in `SHAPES`."""
        return SHAPES.index(self.things[-1].shape)


# ------------------------------------------------------------------------------------------- what there is


def draw_scene(seed: int, index: int, max_objects: int = 4) -> Scene:
    """The scene of an index; all shapes are equally frequent as the main one."""
    rng = random.Random(seed_of(seed, index))
    names = list(COLOURS)
    ground = _draw_texture(rng, rng.sample(names, 2), period=(0.25, 0.9), roughness=(0.02, 0.08))
    free = [name for name in names if name not in ground.colours]
    things = []
    for number in reversed(range(rng.randint(1, max_objects))):
        main = number == 0
        first = rng.choice(free)
        texture = _draw_texture(rng, [first, rng.choice([n for n in names if n != first])], (0.25, 0.7), (0.0, 0.0))
        radius = rng.uniform(0.42, 0.72) if main else rng.uniform(0.16, 0.38)
        room = 1.0 - 0.6 * radius
        y, x = rng.uniform(-room, room), rng.uniform(-room, room)
        things.append(Thing(rng.choice(SHAPES), texture, y, x, radius, rng.uniform(-0.5, 0.5)))
    return Scene(ground, tuple(things), rng.uniform(-0.15, 0.15), rng.getrandbits(63))


def _draw_texture(
    rng: random.Random, colours: list[str], period: tuple[float, float], roughness: tuple[float, float]
) -> Texture:
    pattern = rng.choice(PATTERNS)
    return Texture(
        pattern, (colours[0], colours[1]), rng.uniform(*period), rng.uniform(0, math.pi), rng.uniform(*roughness)
    )


# ------------------------------------------------------------------------------------------- how it looks


def render(scene: Scene, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """RGB pixels `[rows, columns, 3]` of a scene, with soft outlines."""
    y, x = _axes(size)
    image_YXC = _surface(scene.ground, y[:, None], x[None, :])
    image_YXC += ((127 * scene.light) * (y[:, None] + x[None, :]))[:, :, None]
    if scene.ground.roughness:
        image_YXC += _grain(scene.grain_seed, size, 255 * scene.ground.roughness)[:, :, None]
    for thing in scene.things:
        rows, columns = _extent(thing, y), _extent(thing, x, horizontal=True)
        v, u = _local(thing, y[rows, None], x[None, columns])
        alpha = _coverage(thing, v, u, pixel=float(y[1] - y[0]) if len(y) > 1 else 2.0)[:, :, None]
        patch = image_YXC[rows, columns]
        patch += alpha * (_surface(thing.texture, v, u) - patch)
    return image_YXC.clip(0, 255, out=image_YXC).astype(np.uint8)


def coverage(thing: Thing, size: tuple[int, int]) -> Array:
    """Share of each pixel `[rows, columns]` that an object fills, 0 to 1, whatever stands before it."""
    y, x = _axes(size)
    v, u = _local(thing, y[:, None], x[None, :])
    return _coverage(thing, v, u, pixel=2 / min(size))


def _axes(size: tuple[int, int]) -> tuple[Array, Array]:
    """Centres of the pixel rows and columns; the shorter side runs from -1 to 1."""
    short = min(size)
    y, x = ((2 * np.arange(n, dtype=np.float32) + 1 - n) / np.float32(short) for n in size)
    return y, x


def _extent(thing: Thing, axis: Array, horizontal: bool = False) -> slice:
    """The pixels along an axis that an object can touch."""
    centre, reach = (thing.x if horizontal else thing.y), 1.5 * thing.radius
    first, last = np.searchsorted(axis, [centre - reach, centre + reach])
    return slice(int(first), int(last))


def _local(thing: Thing, y: Array, x: Array) -> tuple[Array, Array]:
    """Coordinates of an object's own frame, in which it is upright and of radius 1."""
    c, s = math.cos(thing.angle) / thing.radius, math.sin(thing.angle) / thing.radius
    dy, dx = y - np.float32(thing.y), x - np.float32(thing.x)
    return np.float32(c) * dy - np.float32(s) * dx, np.float32(s) * dy + np.float32(c) * dx


def _coverage(thing: Thing, v: Array, u: Array, pixel: float) -> Array:
    """Soft step of the distance to the outline, one pixel wide."""
    distance = _OUTLINES[thing.shape](v, u)
    return (np.float32(0.5) - distance * np.float32(thing.radius / pixel)).clip(0, 1)


def _surface(texture: Texture, y: Array, x: Array) -> Array:
    """Colours `[y, x, 3]` of a surface."""
    first, second = (np.array(COLOURS[name], np.float32) for name in texture.colours)
    if texture.pattern == "plain":
        return np.broadcast_to(first, (*np.broadcast_shapes(y.shape, x.shape), 3)).copy()
    c, s = np.float32(math.cos(texture.angle)), np.float32(math.sin(texture.angle))
    along, across = c * x + s * y, c * y - s * x
    wave = np.float32(2 * math.pi / texture.period)
    mix: npt.NDArray[Any]
    match texture.pattern:
        case "stripes":
            mix = np.sin(wave * along) > 0
        case "checks":
            mix = (np.sin(wave * along) > 0) ^ (np.sin(wave * across) > 0)
        case "dots":
            mix = np.sin(wave * along) * np.sin(wave * across) > 0.45
        case "waves":
            mix = np.sin(wave * along + np.sin(wave * across)) * np.float32(0.5) + np.float32(0.5)
        case _:
            mix = (along * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
    return first + mix.astype(np.float32)[:, :, None] * (second - first)


def _grain(seed: int, size: tuple[int, int], std: float) -> Array:
    rng = np.random.Generator(np.random.SFC64(seed))
    grain: Array = rng.standard_normal(size, dtype=np.float32)
    grain *= std
    return grain


# Outlines: signed distance (negative inside, about right near the border) in the object's own frame of radius 1.


def _disc(v: Array, u: Array) -> Array:
    return np.sqrt(v * v + u * u) - np.float32(0.9)


def _square(v: Array, u: Array) -> Array:
    return np.maximum(np.abs(v), np.abs(u)) - np.float32(0.8)


def _triangle(v: Array, u: Array) -> Array:
    return np.maximum(np.abs(u) * np.float32(0.866) - v * np.float32(0.5), v) - np.float32(0.5)


def _star(v: Array, u: Array) -> Array:
    arms: Array = np.cos(np.float32(5) * np.arctan2(u, -v))
    return np.sqrt(v * v + u * u) - np.float32(0.68) - np.float32(0.28) * arms


def _ring(v: Array, u: Array) -> Array:
    return np.abs(np.sqrt(v * v + u * u) - np.float32(0.7)) - np.float32(0.22)


def _cross(v: Array, u: Array) -> Array:
    v, u = np.abs(v), np.abs(u)
    return np.maximum(np.minimum(v, u) - np.float32(0.28), np.maximum(v, u) - np.float32(0.9))


def _heart(v: Array, u: Array) -> Array:
    u = np.abs(u)
    tilted = np.float32(-1.1) * v - np.float32(0.1) + np.sqrt(u) * np.float32(-0.55)
    return np.sqrt(tilted * tilted + u * u) - np.float32(0.8)


def _crescent(v: Array, u: Array) -> Array:
    away = u - np.float32(0.45)
    return np.maximum(np.sqrt(v * v + u * u) - np.float32(0.9), np.float32(0.72) - np.sqrt(v * v + away * away))


_OUTLINES: dict[Shape, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
}
