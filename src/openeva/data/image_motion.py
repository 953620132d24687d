"""Clips of real images whose label is how a window moves over the image; what the image shows says nothing.

(seed, index) -> `draw_image_motion` -> `ImageMotion` (an action and a window per frame) -> `render_image_motion` on any
image -> RGB frames; `assign` says which image and which action a clip gets

Names say what the window does, as one speaks of a camera: where it goes left (`pan_left`), what is seen moves to the
right; where it turns clockwise, what is seen turns the other way. An action is one of `STEPS`, or two of them one after
the other, `pan_left_then_pan_up`: there the order is the label.

Appearance carries no label:

- Windows are drawn before the action and without regard to it: their size, angle (any, so that frames of a turn are
  not told by being tilted), whether the image is mirrored, and six places of which the one with the most to be seen is
  taken. Their room in the image is the same for all actions.
- An action and its opposite are one drawing run forwards or backwards: the frames of `pan_left` in the reverse order
  are those of `pan_right`, exactly; `pan_left_then_pan_up` is `pan_down_then_pan_right` backwards.
- `assign` gives every image each action equally often.

What remains: the order of a zoom and a pan shows in how large things are halfway through.

No frame leaves the image: there are no borders. Coordinates: the image is centred at (0, 0), its shorter side runs from
-1 to 1, y grows downwards.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openeva.data.decode import RGB
from openeva.data.motion import MIN_FRAMES, eased
from openeva.data.sampler import seed_of

STEPS: dict[str, tuple[str, int]] = {
    "pan_left": ("x", -1), "pan_right": ("x", 1), "pan_up": ("y", -1), "pan_down": ("y", 1), "zoom_in": ("size", -1),
    "zoom_out": ("size", 1), "rotate_clockwise": ("angle", 1), "rotate_counterclockwise": ("angle", -1),
}  # fmt: skip
"""What a window can do: which of its numbers changes, and whether it becomes larger."""

IMAGE_ACTIONS: tuple[str, ...] = tuple(
    sorted([
        *STEPS, "pan_left_then_pan_up", "pan_up_then_pan_left", "pan_right_then_pan_down", "pan_down_then_pan_right",
        "zoom_in_then_pan_right", "pan_right_then_zoom_in", "pan_left_then_zoom_out", "zoom_out_then_pan_left",
    ])
)  # fmt: skip
"""The usual set, in the order of the labels, which is that of the alphabet: each action's opposite in time is in it."""

MIN_SIDE = 32
"""Pixels of an image's shorter side: of less nothing can be made."""

_DRAW_KEY = 0x1A4E5
_NUM_PLACES = 6
"""Plain sky shows no motion: a clip takes the best of this many places."""
_DETAIL_SIDE = 32


class Window(NamedTuple):
    """What a frame shows: a square of the image, turned and away from the clip's place.

    Attributes:
        dy: Rows from the place to the square's centre, in half shorter sides of the image.
        dx: Columns, likewise.
        size: Half of its side, in half shorter sides of the image.
        angle: How far it is turned clockwise, in radians.
    """

    dy: float
    dx: float
    size: float
    angle: float


@dataclass(frozen=True)
class ImageMotion:
    """One clip, described without its image.

    Attributes:
        action: What the window does.
        windows: Of each frame.
        middle: The window halfway through a single step.
        places: Where in the image, (row, column) as shares of the room that there is, -1 to 1; the one with the most to
            be seen is taken, whatever the action.
        margin: How far from the image's border a place must be.
        mirrored: Whether left and right of the image are exchanged first.
    """

    action: str
    windows: tuple[Window, ...]
    middle: Window
    places: tuple[tuple[float, float], ...]
    margin: float
    mirrored: bool


def check_image_actions(actions: Sequence[str]) -> None:
    """Raise ValueError where one is neither a step nor two different ones, comes twice, or there is none."""
    problems = [action for action in actions if not _is_action(action)]
    if problems or not actions:
        raise ValueError(
            f"actions {', '.join(problems) or '(none)'}: choose from {', '.join(STEPS)}, or two of them that change "
            "different things, such as pan_left_then_pan_up"
        )
    if len(set(actions)) < len(actions):
        raise ValueError(f"actions {', '.join(actions)}: each may be named once")


def _is_action(action: str) -> bool:
    steps = action.split("_then_")
    return (
        all(step in STEPS for step in steps)
        and len(steps) <= 2
        and len({STEPS[step][0] for step in steps}) == len(steps)
    )


def assign(index: int, num_images: int, actions: Sequence[str]) -> tuple[int, str]:
    """Image and action of a clip: of `num_images * len(actions)` clips in a row each pair stands in one.

    In between, numbers of clips per image differ by at most one, and so do those per action.
    """
    names = sorted(actions)
    shift = index // math.lcm(num_images, len(names))
    return index % num_images, names[(index + shift) % len(names)]


def draw_image_motion(seed: int, index: int, action: str, num_frames: int = 32) -> ImageMotion:
    """How the window moves in the clip of an index.

    Args:
        seed: Another seed, other places, sizes and angles.
        index: Number of the clip. All but the direction of the motion depends on (seed, index) alone.
        action: What the window does.
        num_frames: Length; the motion fills it, each of two steps one half.

    Raises:
        ValueError: The action is unknown, or there are fewer than 4 frames.
    """
    check_image_actions([action])
    if num_frames < MIN_FRAMES:
        raise ValueError(f"num_frames {num_frames}: a motion needs at least {MIN_FRAMES} frames")
    rng = random.Random(seed_of(seed, index, _DRAW_KEY))
    size = math.exp(rng.uniform(math.log(0.18), math.log(0.34)))
    pan_y, pan_x = size * rng.uniform(0.5, 0.8), size * rng.uniform(0.5, 0.8)
    reach = {"y": pan_y, "x": pan_x, "size": math.log(rng.uniform(1.6, 2.2)) / 2, "angle": rng.uniform(0.3, 0.6)}
    angle, ease, mirrored = rng.uniform(-math.pi, math.pi), rng.random(), rng.random() < 0.5
    places = tuple((rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(_NUM_PLACES))
    corner = math.sqrt(2) * size
    margin = max(corner * math.exp(reach["size"]) + max(pan_y, pan_x), corner + math.hypot(pan_y, pan_x))
    windows = []
    for frame in range(num_frames):
        # symmetric to the last bit, so that a clip backwards is exactly its opposite
        state = _state(action, (2 * frame + 1 - num_frames) / (num_frames - 1), ease, reach)
        # pans go along the window's sides as they lie then, and before and after a turn they stand still
        c, s = math.cos(angle + state["frame"]), math.sin(angle + state["frame"])
        dy, dx = s * state["x"] + c * state["y"], c * state["x"] - s * state["y"]
        windows.append(Window(dy, dx, size * math.exp(state["size"]), angle + state["angle"]))
    return ImageMotion(action, tuple(windows), Window(0.0, 0.0, size, angle), places, margin, mirrored)


def _state(action: str, time: float, ease: float, reach: dict[str, float]) -> dict[str, float]:
    """How far each number of a window is from its middle at a time from -1 to 1; `frame` is the angle of pans."""
    state = dict.fromkeys([*reach, "frame"], 0.0)
    steps = action.split("_then_")
    for number, step in enumerate(steps):
        what, sign = STEPS[step]
        # of two steps, the first has its time from -1 to 0 and the second from 0 to 1
        own = time if len(steps) == 1 else min(1.0, max(-1.0, 2 * time + 1 - 2 * number))
        state[what] = sign * reach[what] * eased(own, ease)
        if what == "angle" and len(steps) == 2:
            state["frame"] = sign * reach[what] * (-1 if number else 1)
    return state


# ------------------------------------------------------------------------------------------- how it looks


def render_image_motion(image_YXC: RGB, motion: ImageMotion, size: int) -> Iterator[RGB]:
    """RGB frames `[size, size, 3]` of a clip, one after the other.

    Args:
        image_YXC: The image, of at least 32 pixels in both directions.
        motion: How the window moves.
        size: Side length in pixels.

    Raises:
        ValueError: The image is too small.
    """
    height, width = image_YXC.shape[:2]
    short = min(height, width)
    if short < MIN_SIDE:
        raise ValueError(f"an image of {width}x{height} pixels is too small; both sides must be at least {MIN_SIDE}")
    # two samples per pixel and direction, then their mean; the image is shrunk first where they would skip pixels
    image_CYX = _shrunk(image_YXC, 2 * size / (motion.middle.size * short))
    if motion.mirrored:
        image_CYX = image_CYX.flip(2)
    room_YX = height / short - motion.margin, width / short - motion.margin
    places = [(y * room_YX[0], x * room_YX[1]) for y, x in motion.places]
    place = max(places, key=lambda place: _detail(_look(image_CYX, motion.middle, place, _DETAIL_SIDE)))
    for window in motion.windows:
        frame_CYX = F.avg_pool2d(_look(image_CYX, window, place, 2 * size), 2)
        yield frame_CYX.round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def _shrunk(image_YXC: RGB, scale: float) -> Tensor:
    """As float `[3, Y, X]`, resized with antialiasing where `scale` is below 1."""
    image_CYX = torch.from_numpy(np.array(image_YXC)).permute(2, 0, 1).float()
    if scale >= 1:
        return image_CYX
    sides = [max(1, round(side * scale)) for side in image_YXC.shape[:2]]
    return F.interpolate(image_CYX[None], size=sides, mode="bilinear", antialias=True)[0]


def _look(image_CYX: Tensor, window: Window, place: tuple[float, float], points: int) -> Tensor:
    """What a window at a place shows, float `[3, points, points]`."""
    height, width = image_CYX.shape[1:]
    half_y, half_x = height / min(height, width), width / min(height, width)
    y, x = place[0] + window.dy, place[1] + window.dx
    along = (torch.arange(points) * 2 + 1 - points) * (window.size / points)
    c, s = math.cos(window.angle), math.sin(window.angle)
    v, u = along[:, None], along[None, :]
    grid_YXD = torch.stack([(x + c * u - s * v) / half_x, (y + s * u + c * v) / half_y], dim=-1)
    return F.grid_sample(image_CYX[None], grid_YXD[None], "bilinear", "border", align_corners=False)[0]


def _detail(image_CYX: Tensor) -> float:
    """How well a motion in any direction shows: the least mean squared change of brightness along any direction."""
    grey_YX = image_CYX.mean(0)
    dy, dx = grey_YX[1:, :-1] - grey_YX[:-1, :-1], grey_YX[:-1, 1:] - grey_YX[:-1, :-1]
    yy, xx, yx = float((dy * dy).mean()), float((dx * dx).mean()), float((dy * dx).mean())
    return (yy + xx) / 2 - math.hypot((yy - xx) / 2, yx)
