"""Clips of moving objects whose label is what the main object does, and nothing else.

(seed, index) -> `draw_motion` -> `Motion` (an action and a `Scene` per frame) -> `render_motion` -> RGB frames

Every clip shows two objects of like size (an easy one a large and a small one), up to two small ones and a ground; the
main object is drawn last, in front.
What they look like and where they are is drawn before the action and without regard to it:

- A direction and its opposite are one drawing run forwards or backwards: the frames of `move_left` in the reverse order
  are those of `move_right`, exactly, and so for up and down, grow and shrink, the two turns, appear and disappear. Who
  does not know the order of the frames knows nothing about the direction.
- Places are drawn for the middle of a motion, so that a middle frame says nothing about the direction either. The first
  and the last must say a little: what moves left is on average further right at first. Paths are short against the
  places they may start from, but in easy clips. Turns start at any angle: none of their frames says anything.
- Every object has a pattern of two colours that differ clearly, so that a turn shows on any of them, discs included.
- `collide` and `pass` begin and end with the two objects where they are in all other clips; they bounce, or change
  places, the main object crossing in front.

Coordinates are those of `scene.py`. Times run from -1 (first frame) to 1 (last frame).
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from openeva.data.decode import RGB
from openeva.data.sampler import seed_of
from openeva.data.scene import COLOURS, PATTERNS, SHAPES, Scene, Texture, Thing, coverage, render

ACTIONS: tuple[str, ...] = (
    "appear", "collide", "disappear", "grow", "move_down", "move_left", "move_right", "move_up", "pass", "shrink",
    "turn_clockwise", "turn_counterclockwise",
)  # fmt: skip
"""What a main object can do, in the order of the labels, which is that of the alphabet."""

MIN_FRAMES = 4
"""Fewer frames do not show a bounce."""

_BASE = {
    "move_left": "move_right", "move_up": "move_down", "shrink": "grow", "turn_counterclockwise": "turn_clockwise",
    "disappear": "appear",
}  # fmt: skip
"""Action -> the one that it is in reverse."""
_DRAW_KEY, _LABEL_KEY = 0xC11B, 0x1ABE1
_ROOM = 0.65
"""How far from the middle of the picture the centre of a main object may be, halfway through its motion."""
_MIN_CONTRAST = 140.0
"""Distance between the two colours of a pattern, of 441 between black and white."""


class _Ranges(NamedTuple):
    """Between which numbers a clip is drawn.

    Attributes:
        radius: Of the main object.
        partner: Radius of its partner.
        distance: Half the length of a path.
        growth: Square root of the factor by which things grow.
        textured: Whether grounds have a pattern.
    """

    radius: tuple[float, float]
    partner: tuple[float, float]
    distance: tuple[float, float]
    growth: tuple[float, float]
    textured: bool


_USUAL = _Ranges(radius=(0.17, 0.4), partner=(0.17, 0.4), distance=(0.22, 0.36), growth=(1.22, 1.32), textured=True)
_EASY = _Ranges(radius=(0.35, 0.55), partner=(0.17, 0.25), distance=(0.5, 0.7), growth=(1.45, 1.65), textured=False)


@dataclass(frozen=True)
class Motion:
    """One clip, described.

    Attributes:
        action: What the main object does, one of `ACTIONS`.
        scenes: What each frame shows. The main object is the last thing; before it appears, or after it disappeared, it
            is not among them.
    """

    action: str
    scenes: tuple[Scene, ...]

    @property
    def label(self) -> int:
        """Number of the action in `ACTIONS`."""
        return ACTIONS.index(self.action)


@dataclass(frozen=True)
class _Layout:
    """What all frames of a clip have in common, whatever happens in it.

    Attributes:
        still: The ground, the small objects, the partner and the main object, each as it is halfway through.
        drifts: (y, x) by which the small objects and the partner move per unit of time.
        ease: 0 = even speed, 1 = slow at both ends.
        moment: When things meet, appear or disappear.
        distance: Half the length of a path.
        turn: Half of a turn, in radians.
        growth: Square root of the factor by which things grow.
        backwards: Whether a motion that is its own opposite (collide, pass) is shown backwards.
    """

    still: Scene
    drifts: tuple[tuple[float, float], ...]
    ease: float
    moment: float
    distance: float
    turn: float
    growth: float
    backwards: bool


def check_actions(actions: Sequence[str], known: Sequence[str] = ACTIONS) -> None:
    """Raise ValueError where an action is unknown, comes twice, or there is none."""
    unknown = [action for action in actions if action not in known]
    if unknown or not actions:
        raise ValueError(f"actions {', '.join(unknown) or '(none)'}: choose from {', '.join(known)}")
    if len(set(actions)) < len(actions):
        raise ValueError(f"actions {', '.join(actions)}: each may be named once")


def action_of(seed: int, index: int, actions: Sequence[str]) -> str:
    """The action of a clip: each stands once in every `len(actions)` clips, in an order that the seed draws."""
    block, place = divmod(index, len(actions))
    order = sorted(actions)
    random.Random(seed_of(seed, block, _LABEL_KEY)).shuffle(order)
    return order[place]


def draw_motion(
    seed: int,
    index: int,
    num_frames: int = 32,
    *,
    actions: Sequence[str] = ACTIONS,
    drift: bool = False,
    easy: bool = False,
) -> Motion:
    """The clip of an index.

    Args:
        seed: Another seed, other clips.
        index: Number of the clip. Its look depends on (seed, index) alone, not on the actions to choose from.
        num_frames: Length; the motion fills it.
        actions: Which may come. Of every `len(actions)` clips in a row, beginning at 0, each shows another one.
        drift: True = the other objects move as well, slowly and in any direction. False = they stand still.
        easy: True = grounds are plain, objects larger and their paths longer: a small model can learn what happens
            within minutes.

    Raises:
        ValueError: An action is unknown, or there are fewer than 4 frames.
    """
    check_actions(actions)
    if num_frames < MIN_FRAMES:
        raise ValueError(f"num_frames {num_frames}: a motion needs at least {MIN_FRAMES} frames")
    action = action_of(seed, index, actions)
    layout = _draw_layout(random.Random(seed_of(seed, index, _DRAW_KEY)), _EASY if easy else _USUAL, drift)
    path = _path(layout, _BASE.get(action, action))
    # symmetric to the last bit, so that a clip backwards is exactly its opposite
    times = [(2 * frame + 1 - num_frames) / (num_frames - 1) for frame in range(num_frames)]
    scenes = tuple(_at(layout, path, time) for time in times)
    backwards = action in _BASE or (action in {"collide", "pass"} and layout.backwards)
    return Motion(action, scenes[::-1] if backwards else scenes)


def render_motion(motion: Motion, size: int | tuple[int, int]) -> Iterator[RGB]:
    """RGB frames `[rows, columns, 3]` of a clip, one after the other.

    Args:
        motion: The clip.
        size: Side length in pixels, or (rows, columns).
    """
    rows_columns = (size, size) if isinstance(size, int) else size
    for scene in motion.scenes:
        yield render(scene, rows_columns)


# ------------------------------------------------------------------------------------------- what there is


def _draw_layout(rng: random.Random, ranges: _Ranges, drift: bool) -> _Layout:
    names = list(COLOURS)
    first, second = rng.sample(names, 2)
    pattern = rng.choice(PATTERNS)
    period, angle, roughness = rng.uniform(0.4, 1.0), rng.uniform(0, math.pi), rng.uniform(0.02, 0.06)
    ground = Texture(pattern if ranges.textured else "plain", (first, second), period, angle, roughness)
    free = [name for name in names if name not in ground.colours]
    (main_y, main_x), (y, x), main_radius, radius = _draw_places(rng, ranges)
    main = Thing(
        rng.choice(SHAPES), _draw_pattern(rng, free), main_y, main_x, main_radius, rng.uniform(-math.pi, math.pi)
    )
    partner = Thing(rng.choice(SHAPES), _draw_pattern(rng, free), y, x, radius, rng.uniform(-math.pi, math.pi))
    small = [
        Thing(
            rng.choice(SHAPES), _draw_pattern(rng, free), rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.9),
            rng.uniform(0.09, 0.16), rng.uniform(-math.pi, math.pi),
        )
        for _ in range(rng.randint(0, 2))
    ]  # fmt: skip
    things = (*small, partner, main)
    return _Layout(
        still=Scene(ground, things, rng.uniform(-0.15, 0.15), rng.getrandbits(63)),
        drifts=tuple(_draw_drift(rng, drift) for _ in things[:-1]),
        ease=rng.random(), moment=rng.uniform(-0.35, 0.35), distance=rng.uniform(*ranges.distance),
        turn=rng.uniform(0.7, 1.2), growth=rng.uniform(*ranges.growth), backwards=rng.random() < 0.5,
    )  # fmt: skip


def _draw_places(rng: random.Random, ranges: _Ranges) -> tuple[tuple[float, float], tuple[float, float], float, float]:
    """Two places far enough from each other for a collision, and the radii of the objects there."""
    while True:
        here, there = ((rng.uniform(-_ROOM, _ROOM), rng.uniform(-_ROOM, _ROOM)) for _ in range(2))
        radii = [math.exp(rng.uniform(*map(math.log, radius))) for radius in (ranges.radius, ranges.partner)]
        if math.dist(here, there) > max(0.9, 1.1 * sum(radii) + 0.35):
            return here, there, radii[0], radii[1]


def _draw_pattern(rng: random.Random, free: list[str]) -> Texture:
    """A surface on which a turn shows, of colours that the ground has not."""
    while True:
        first, second = rng.sample(free, 2)
        if math.dist(COLOURS[first], COLOURS[second]) > _MIN_CONTRAST:
            break
    pattern = rng.choice([pattern for pattern in PATTERNS if pattern != "plain"])
    return Texture(pattern, (first, second), rng.uniform(0.8, 1.5), rng.uniform(0, math.pi))


def _draw_drift(rng: random.Random, drift: bool) -> tuple[float, float]:
    angle, speed = rng.uniform(-math.pi, math.pi), rng.uniform(0.0, 0.08)
    return (speed * math.sin(angle), speed * math.cos(angle)) if drift else (0.0, 0.0)


# ------------------------------------------------------------------------------------------- what happens

_Path = Callable[[float], tuple[Thing, Thing | None]]
"""Time, eased or not as the motion needs -> the partner and the main object; None = it is not there."""


def _at(layout: _Layout, path: _Path, time: float) -> Scene:
    partner, main = path(time)
    others = [*layout.still.things[:-2], partner]
    moved = [
        replace(thing, y=thing.y + time * dy, x=thing.x + time * dx) if dy or dx else thing
        for thing, (dy, dx) in zip(others, layout.drifts, strict=True)
    ]
    return replace(layout.still, things=(*moved, main) if main is not None else tuple(moved))


def _path(layout: _Layout, action: str) -> _Path:
    partner, main = layout.still.things[-2:]
    if action in {"collide", "pass"}:
        return _encounter(layout, partner, main, bounce=action == "collide")

    def path(time: float) -> tuple[Thing, Thing | None]:
        way = eased(time, layout.ease)
        match action:
            case "move_right":
                return partner, replace(main, x=main.x + way * layout.distance)
            case "move_down":
                return partner, replace(main, y=main.y + way * layout.distance)
            case "grow":
                return partner, replace(main, radius=main.radius * layout.growth**way)
            case "turn_clockwise":
                return partner, replace(main, angle=main.angle + way * layout.turn)
            case _:  # appear
                return partner, main if time >= layout.moment else None

    return path


def eased(time: float, ease: float) -> float:
    """From -1 to 1 as time does, odd; with ease slower near the ends."""
    return time * (1 - ease + ease * (3 - time * time) / 2)


def _encounter(layout: _Layout, partner: Thing, main: Thing, bounce: bool) -> _Path:
    """Both go towards each other at the same speed, and then back (`bounce`), or on to each other's place."""
    middle_y, middle_x = (main.y + partner.y) / 2, (main.x + partner.x) / 2
    half_y, half_x = (main.y - partner.y) / 2, (main.x - partner.x) / 2
    nearest = _contact(partner, main) if bounce else 0.0

    def path(time: float) -> tuple[Thing, Thing]:
        before = time <= layout.moment
        left = (layout.moment - time) / (layout.moment + 1) if before else (time - layout.moment) / (1 - layout.moment)
        apart = nearest + (1 - nearest) * left  # as a share of the distance at first
        if not bounce and not before:
            apart = -apart
        return (
            replace(partner, y=middle_y - apart * half_y, x=middle_x - apart * half_x),
            replace(main, y=middle_y + apart * half_y, x=middle_x + apart * half_x),
        )

    return path


def _contact(partner: Thing, main: Thing, pixels: int = 64) -> float:
    """Share of their distance at which two objects that approach each other touch; they never do at 1."""
    reach = 1.5 * (partner.radius + main.radius)
    half_y, half_x = (main.y - partner.y) / 2 / reach, (main.x - partner.x) / 2 / reach
    near, far = 0.0, 1.0
    for _ in range(8):
        share = (near + far) / 2
        masks = []
        for thing, side in ((partner, -share), (main, share)):
            small = replace(thing, y=side * half_y, x=side * half_x, radius=thing.radius / reach)
            masks.append(coverage(small, (pixels, pixels)))
        if float(np.minimum(*masks).sum()) > 0.5:
            near = share
        else:
            far = share
    return far
