"""Clips of windows moving over images: measured in the pixels, and the same for every label but for the order."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from openeva.data.image_motion import (
    IMAGE_ACTIONS,
    STEPS,
    assign,
    draw_image_motion,
    render_image_motion,
)

SIZE = 32


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Soft blotches, without any direction."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC))


def clip(image: np.ndarray, action: str, index: int, num_frames: int = 9) -> np.ndarray:
    """Grey frames."""
    motion = draw_image_motion(0, index, action, num_frames)
    return np.stack(list(render_image_motion(image, motion, SIZE))).astype(float).mean(3)


def shift(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """By how many rows and columns what is seen has moved: where the two agree best."""
    inner = slice(8, -8)
    best = min(
        ((dy, dx) for dy in range(-8, 9) for dx in range(-8, 9)),
        key=lambda by: np.abs(np.roll(before, by, (0, 1))[inner, inner] - after[inner, inner]).mean(),
    )
    return int(best[0]), int(best[1])


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    y, x = np.mgrid[: len(a), : len(a)] - (len(a) - 1) / 2
    disc = y * y + x * x < (len(a) / 2 - 1) ** 2
    return float(np.corrcoef(a[disc], b[disc])[0, 1])


@pytest.mark.parametrize(
    ("action", "rows", "columns"),
    [("pan_left", 0, 1), ("pan_right", 0, -1), ("pan_up", 1, 0), ("pan_down", -1, 0)],
)
def test_what_is_seen_moves_against_the_window(image, action, rows, columns):
    for index in range(6):
        frames = clip(image, action, index)
        for before, after in pairwise(frames[2:7]):
            dy, dx = shift(before, after)
            assert (np.sign(dy), np.sign(dx)) == (rows, columns)


@pytest.mark.parametrize(("action", "sign"), [("zoom_in", 1), ("zoom_out", -1)])
def test_zooms_make_things_larger_or_smaller(image, action, sign):
    for index in range(6):
        first, last = clip(image, action, index)[:: sign * 8]
        middle = Image.fromarray(first).crop((8, 8, 24, 24)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        assert likeness(np.asarray(middle), last) > likeness(first, last) + 0.2


@pytest.mark.parametrize(("action", "sign"), [("rotate_clockwise", 1), ("rotate_counterclockwise", -1)])
def test_what_is_seen_turns_against_the_window(image, action, sign):
    for index in range(6):
        frames = clip(image, action, index)
        turned = {
            angle: likeness(np.asarray(Image.fromarray(frames[0]).rotate(angle, Image.Resampling.BICUBIC)), frames[-1])
            for angle in range(-80, 81, 10)
        }
        best = max(turned, key=turned.__getitem__)  # Pillow counts counter-clockwise
        assert turned[best] > 0.85
        assert 30 <= sign * best <= 70


def test_two_steps_are_one_after_the_other(image):
    """Of 17 frames, 8 steps each."""

    def directions(action: str, index: int) -> list[list[int]]:
        frames = clip(image, action, index, 17)
        return [np.sign(shift(frames[number], frames[number + 1])).tolist() for number in (2, 4, 5, 10, 11, 13)]

    for index in range(4):
        assert directions("pan_left_then_pan_up", index) == [[0, 1]] * 3 + [[1, 0]] * 3
        assert directions("pan_up_then_pan_left", index) == [[1, 0]] * 3 + [[0, 1]] * 3
        assert directions("zoom_in_then_pan_right", index)[3:] == [[0, -1]] * 3
        assert directions("pan_down_then_rotate_clockwise", index)[:3] == [[-1, 0]] * 3


def test_order_of_two_steps_is_all_that_differs(image):
    """Both begin and end with the same frame."""
    for one, other in [
        ("pan_left_then_pan_up", "pan_up_then_pan_left"), ("zoom_in_then_pan_right", "pan_right_then_zoom_in"),
    ]:  # fmt: skip
        for index in range(3):
            first, second = clip(image, one, index), clip(image, other, index)
            assert (first[[0, -1]] == second[[0, -1]]).all()
            assert (first[4] != second[4]).any()


OPPOSITES = {
    "pan_left": "pan_right", "pan_up": "pan_down", "zoom_in": "zoom_out",
    "rotate_clockwise": "rotate_counterclockwise", "pan_left_then_pan_up": "pan_down_then_pan_right",
    "pan_up_then_pan_left": "pan_right_then_pan_down", "zoom_in_then_pan_right": "pan_left_then_zoom_out",
    "pan_right_then_zoom_in": "zoom_out_then_pan_left",
    "rotate_clockwise_then_pan_up": "pan_down_then_rotate_counterclockwise",
}  # fmt: skip


@pytest.mark.parametrize(("action", "opposite"), OPPOSITES.items())
def test_a_clip_backwards_is_its_opposite(image, action, opposite):
    """So that the frames of both are the same, and a middle frame is one picture for all directions."""
    for index in range(3):
        forwards, backwards = clip(image, action, index), clip(image, opposite, index)
        assert (forwards == backwards[::-1]).all()
        assert (forwards != backwards).any()
        if action in STEPS:
            assert (forwards[4] == clip(image, "pan_left", index)[4]).all()


def test_the_usual_set_is_closed_under_time():
    pairs = {action: other for action, other in OPPOSITES.items() if action in IMAGE_ACTIONS}
    assert sorted([*pairs, *pairs.values()]) == list(IMAGE_ACTIONS)


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (120, 64)])
def test_no_frame_leaves_the_image(shape):
    framed = np.zeros((*shape, 3), np.uint8)
    framed[:, :, 1] = np.random.default_rng(1).integers(0, 255, shape)
    framed[[0, -1]] = framed[:, [0, -1]] = (255, 0, 0)
    actions = [*IMAGE_ACTIONS, "rotate_clockwise_then_zoom_out", "zoom_out_then_rotate_clockwise"]
    for index in range(3 * len(actions)):
        motion = draw_image_motion(3, index, actions[index % len(actions)], 5)
        frames = np.stack(list(render_image_motion(framed, motion, SIZE)))
        assert frames.shape == (5, SIZE, SIZE, 3)
        assert frames[..., 0].max() < 130  # the red line itself at most touches a corner


def test_all_orientations_and_mirrored_images_come():
    motions = [draw_image_motion(0, index, "pan_left", 4) for index in range(200)]
    quarters = Counter(math.floor(motion.middle.angle / (math.pi / 2)) for motion in motions)
    assert len(quarters) == 4
    assert min(quarters.values()) > 30
    assert 70 < sum(motion.mirrored for motion in motions) < 130


def test_plain_places_are_avoided():
    """In an image that is a plain sky for the most part, something is to be seen."""
    sky = np.full((200, 200, 3), 120, np.uint8)
    sky[130:] = np.random.default_rng(0).integers(0, 255, (70, 200, 3))
    plain = 0
    for index in range(40):
        frames = clip(sky, "rotate_clockwise", index, 4)
        plain += np.abs(frames[0] - frames[-1]).mean() < 1
    assert plain <= 3


def test_every_image_gets_every_action_equally_often():
    actions = ["pan_left", "pan_right", "pan_up", "zoom_in", "zoom_out", "pan_down"]
    for num_images in (1, 4, 5, 6, 9):
        pairs = [assign(index, num_images, actions) for index in range(2 * num_images * len(actions))]
        assert set(Counter(pairs).values()) == {2}
        for end in range(1, len(pairs)):
            per_image = Counter(number for number, _ in pairs[:end])
            per_action = Counter(action for _, action in pairs[:end])
            assert max(per_image.values()) - min(per_image[number] for number in range(num_images)) <= 1
            assert max(per_action.values()) - min(per_action[action] for action in actions) <= 2


def test_clips_depend_on_seed_and_index_alone(image):
    assert draw_image_motion(1, 2, "zoom_in", 8) == draw_image_motion(1, 2, "zoom_in", 8)
    assert draw_image_motion(1, 2, "zoom_in", 8) != draw_image_motion(1, 3, "zoom_in", 8)
    assert draw_image_motion(1, 2, "zoom_in", 8) != draw_image_motion(2, 2, "zoom_in", 8)
    assert (clip(image, "pan_left", 5) == clip(image, "pan_left", 5)).all()


def test_wrong_arguments_are_named(image):
    for action in ("pan_in", "pan_left_then_pan_right", "pan_left_then_pan_up_then_zoom_in"):
        with pytest.raises(ValueError, match=action):
            draw_image_motion(0, 0, action)
    with pytest.raises(ValueError, match="at least 4 frames"):
        draw_image_motion(0, 0, "pan_left", 3)
    with pytest.raises(ValueError, match="20x240 pixels is too small"):
        list(render_image_motion(image[:, :20], draw_image_motion(0, 0, "pan_left"), SIZE))
