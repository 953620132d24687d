"""Clips of moving objects: what happens is what the label says, and nothing but the order of frames says it."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from openeva.cli import app
from openeva.config import ConfigError
from openeva.data import motion as motions
from openeva.data import motion_clips
from openeva.data.motion import ACTIONS, action_of, draw_motion, render_motion
from openeva.data.motion_clips import Options, build
from openeva.data.scene import Scene, coverage, render

OPPOSITES = [
    ("move_left", "move_right"), ("move_up", "move_down"), ("grow", "shrink"),
    ("turn_clockwise", "turn_counterclockwise"), ("appear", "disappear"),
]  # fmt: skip


def look(scene: Scene, main: bool = True) -> tuple:
    """What is there, without places and sizes."""
    things = [(thing.shape, thing.texture) for thing in scene.things]
    return scene.ground, scene.light, scene.grain_seed, tuple(things if main else things[:-1])


def centre_and_area(scene: Scene, side: int = 48) -> tuple[float, float, float]:
    """Where the main object is in the picture (row, column, pixels), from the pixels that it changes."""
    seen = render(scene, (side, side)).astype(float)
    without = render(replace(scene, things=scene.things[:-1]), (side, side)).astype(float)
    mask = np.abs(seen - without).max(2) > 40
    y, x = np.nonzero(mask)
    return float(y.mean()), float(x.mean()), float(mask.sum())


def test_clips_depend_on_seed_and_index_alone():
    assert draw_motion(3, 14, 8) == draw_motion(3, 14, 8)
    first, last = draw_motion(3, 14, 8), draw_motion(3, 14, 32)
    assert first.action == last.action
    assert first.scenes[0] == last.scenes[0]
    assert first.scenes[-1] == last.scenes[-1]
    assert draw_motion(4, 14, 8).scenes[0] != first.scenes[0]
    assert draw_motion(3, 15, 8).scenes[0] != first.scenes[0]
    frames = list(render_motion(first, (24, 40)))
    assert np.stack(frames).shape == (8, 24, 40, 3)
    assert all((a == b).all() for a, b in zip(frames, render_motion(draw_motion(3, 14, 8), (24, 40)), strict=True))
    assert (frames[0] != frames[-1]).any()


def test_labels_are_equally_frequent_and_in_no_fixed_order():
    counts = Counter(action_of(0, index, ACTIONS) for index in range(12 * 20))
    assert counts == dict.fromkeys(ACTIONS, 20)
    orders = {tuple(action_of(0, 12 * block + place, ACTIONS) for place in range(12)) for block in range(20)}
    assert len(orders) == 20
    assert Counter(action_of(5, i, ["grow", "pass"]) for i in range(10)) == {"grow": 5, "pass": 5}
    assert list(ACTIONS) == sorted(ACTIONS)
    assert {(draw_motion(0, i, 4).action, draw_motion(0, i, 4).label) for i in range(12)} == set(
        zip(ACTIONS, range(12), strict=True)
    )


def test_looks_do_not_depend_on_the_label():
    """The same index shows the same things, whatever happens to them."""
    for index in range(20):
        clips = [draw_motion(1, index, 9, actions=(action,)) for action in ACTIONS]
        whole = {look(scene) for clip in clips for scene in clip.scenes if "appear" not in clip.action}
        assert len(whole) == 1
        seen = {look(scene) for clip in clips for scene in clip.scenes if "appear" in clip.action}
        assert seen == whole | {look(clips[-1].scenes[0], main=False)}
        # halfway through, the directions are one picture
        middles = [clip.scenes[4] for clip in clips if clip.action.startswith(("move", "grow", "shrink", "turn"))]
        assert all(middle == middles[0] for middle in middles)
        # what meets begins and ends where it is in the others, or in each other's place
        there = {(thing.y, thing.x) for thing in middles[0].things[-2:]}
        for clip in clips:
            if clip.action in {"collide", "pass"}:
                for scene in (clip.scenes[0], clip.scenes[-1]):
                    found = sorted((thing.y, thing.x) for thing in scene.things[-2:])
                    assert np.allclose(found, sorted(there))


@pytest.mark.parametrize("how", [{}, {"drift": True}, {"easy": True}])
@pytest.mark.parametrize(("action", "opposite"), OPPOSITES)
def test_a_clip_backwards_is_its_opposite(action, opposite, how):
    for index in range(5):
        forwards = draw_motion(2, index, 10, actions=(action,), **how)
        backwards = draw_motion(2, index, 10, actions=(opposite,), **how)
        assert forwards.scenes == backwards.scenes[::-1]
        assert forwards.scenes != backwards.scenes


@pytest.mark.parametrize(
    ("action", "axis", "sign"),
    [("move_left", 1, -1), ("move_right", 1, 1), ("move_up", 0, -1), ("move_down", 0, 1)],
)
def test_things_move_where_the_label_says(action, axis, sign):
    for index in range(8):
        scenes = draw_motion(0, index, 6, actions=(action,)).scenes
        places = [centre_and_area(scene) for scene in scenes]
        along = sign * np.diff([place[axis] for place in places])
        across = np.diff([place[1 - axis] for place in places])
        assert (along > 0).all()
        assert along.sum() > 6  # of 48 pixels
        assert np.abs(across).max() < 2


def test_things_grow_and_shrink():
    for index in range(8):
        sizes = [centre_and_area(scene)[2] for scene in draw_motion(0, index, 6, actions=("grow",)).scenes]
        assert sizes[-1] > 1.4 * sizes[0]
        sizes = [centre_and_area(scene)[2] for scene in draw_motion(0, index, 6, actions=("shrink",)).scenes]
        assert sizes[-1] < sizes[0] / 1.4


@pytest.mark.parametrize(("action", "sign"), [("turn_clockwise", 1), ("turn_counterclockwise", -1)])
def test_things_turn_as_one_sees_it(action, sign):
    """The direction in which a plain gradient becomes brighter goes round, rows counting downwards."""
    found = 0
    for index in range(140):
        first, *rest = draw_motion(0, index, 6, actions=(action,)).scenes
        main = first.things[-1]
        if main.texture.pattern != "gradient" or main.shape not in {"disc", "square"}:
            continue
        angles = []
        for scene in (first, *rest):
            alone = replace(scene, things=(replace(scene.things[-1], y=0.0, x=0.0, radius=0.9),))
            grey = render(alone, (32, 32)).astype(float).mean(2)
            mask = coverage(alone.things[0], (32, 32)) > 0.99
            y, x = np.nonzero(mask)
            slopes = np.linalg.lstsq(np.stack([y, x, np.ones(len(y))], 1), grey[mask], rcond=None)[0]
            angles.append(math.atan2(slopes[0], slopes[1]))
        steps = sign * np.angle(np.exp(1j * np.diff(angles)))
        assert (steps > 0).all()
        assert 1.2 < steps.sum() < 2.5
        found += 1
    assert found > 3


def test_every_turn_shows():
    """Also discs and rings: their surface has a pattern of two colours that differ."""
    shapes = set()
    for index in range(60):
        scenes = draw_motion(7, index, 4, actions=("turn_clockwise",)).scenes
        first, *others = (render(scene, (48, 48)).astype(float) for scene in scenes)
        mask = coverage(scenes[0].things[-1], (48, 48)) > 0.5
        assert max(np.abs(first - other).max(2)[mask].mean() for other in others) > 14
        shapes.add(scenes[0].things[-1].shape)
    assert shapes == set(motions.SHAPES)


def test_things_appear_and_disappear_once_within_the_clip():
    moments = set()
    for index in range(10):
        present = [len(scene.things) for scene in draw_motion(0, index, 16, actions=("appear",)).scenes]
        assert present == sorted(present)
        assert present[-1] == present[0] + 1
        moments.add(present.index(present[-1]))
        gone = [len(scene.things) for scene in draw_motion(0, index, 16, actions=("disappear",)).scenes]
        assert gone == present[::-1]
    assert len(moments) > 3
    assert min(moments) > 3
    assert max(moments) < 13


def test_things_bounce_or_pass():
    for index in range(12):
        for action in ("collide", "pass"):
            scenes = draw_motion(0, index, 17, actions=(action,)).scenes
            pairs = [scene.things[-2:] for scene in scenes]
            distances = [math.dist((a.y, a.x), (b.y, b.x)) for a, b in pairs]
            nearest = int(np.argmin(distances))
            assert 3 < nearest < 13
            assert (np.diff(distances[: nearest + 1]) < 0).all()
            assert (np.diff(distances[nearest:]) > 0).all()
            assert distances[0] == pytest.approx(distances[-1])
            assert distances[0] - distances[nearest] > 0.15
            both = [np.minimum(*(coverage(thing, (64, 64)) for thing in pair)).sum() for pair in pairs]
            stays = np.allclose([(thing.y, thing.x) for thing in pairs[0]], [(t.y, t.x) for t in pairs[-1]])
            if action == "collide":
                assert max(both) < 3  # of 4096 pixels: they touch, but do not cover each other
                larger = [replace(thing, radius=1.3 * thing.radius) for thing in pairs[nearest]]
                assert np.minimum(*(coverage(thing, (64, 64)) for thing in larger)).sum() > 1.5
                assert stays
            else:
                assert max(both) > 20
                assert not stays


def test_only_slow_drifts_distract():
    still = draw_motion(0, 3, 8, actions=("move_left",)).scenes
    drifting = draw_motion(0, 3, 8, actions=("move_left",), drift=True).scenes
    assert still[0].things[:-1] == still[-1].things[:-1]
    assert [scene.things[-1] for scene in still] == [scene.things[-1] for scene in drifting]
    for before, after in zip(drifting[0].things[:-1], drifting[-1].things[:-1], strict=True):
        assert 0 < math.dist((before.y, before.x), (after.y, after.x)) < 0.2


def path_length(motion: motions.Motion) -> float:
    first, last = motion.scenes[0].things[-1], motion.scenes[-1].things[-1]
    return math.dist((first.y, first.x), (last.y, last.x))


def test_easy_clips_show_more_on_less():
    """All actions, the encounters included, can be drawn with large objects."""
    for index in range(60):
        usual, easy = (draw_motion(5, index, 6, easy=easy) for easy in (False, True))
        assert usual.action == easy.action
        assert {scene.ground.pattern for scene in easy.scenes} == {"plain"}
        if easy.action.startswith("move"):
            far, near = (path_length(motion) for motion in (easy, usual))
            assert near < 0.73 < 0.99 < far
            assert easy.scenes[0].things[-1].radius > 0.34
    assert len({draw_motion(5, index, 4, easy=True).scenes[0].ground.colours[0] for index in range(60)}) > 6


def occupied(scene: Scene) -> np.ndarray:
    """How much there is in each of six columns of a picture."""
    picture = render(scene, (24, 24)).astype(float)
    share = np.abs(picture - np.median(picture, (0, 1))).sum(2).mean(0).reshape(6, 4).mean(1)
    return share / share.sum()


def test_one_frame_tells_little_of_left_and_right():
    """A linear classifier of the middle frame guesses; that of the last one sees a little of where things end."""
    clips = [draw_motion(11, index, 5, actions=("move_left", "move_right")) for index in range(600)]
    labels = [clip.action for clip in clips]
    accuracy = {}
    for frame in (2, 4):
        features = [occupied(clip.scenes[frame]) for clip in clips]
        probe = LogisticRegression(max_iter=200).fit(features[:300], labels[:300])
        accuracy[frame] = probe.score(features[300:], labels[300:])
    assert abs(accuracy[2] - 0.5) < 0.1  # 3.5 standard deviations of 300 guesses
    assert 0.57 < accuracy[4] < 0.75


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="jump"):
        draw_motion(0, 0, actions=("jump", "grow"))
    with pytest.raises(ValueError, match="each may be named once"):
        draw_motion(0, 0, actions=("grow", "grow"))
    with pytest.raises(ValueError, match="at least 4 frames"):
        draw_motion(0, 0, 3)


# ---------------------------------------------------------------------------------- openeva data clips


def decoded(path: Path) -> np.ndarray:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "clips", *map(str, arguments)])
    return result.exit_code, result.output


SMALL = ("--num", 30, "--frames", 8, "--size", 32, "--actions", "move_up,grow,pass", "--workers", 0)


def test_command_writes_videos_lists_and_names(tmp_path):
    pytest.importorskip("av")
    out = tmp_path / "clips"
    status, text = run(out, *SMALL)
    assert status == 0, text
    assert (out / "labels.csv").read_text() == "id,name\n0,grow\n1,move_up\n2,pass\n"
    seen = set()
    for part, each in (("train", 8), ("val", 2)):
        lines = [line.rsplit(" ", 1) for line in (out / f"{part}.txt").read_text().splitlines()]
        assert Counter(label for _, label in lines) == {"0": each, "1": each, "2": each}
        for path, label in lines:
            assert path.split("/")[:2] == [part, ["grow", "move_up", "pass"][int(label)]]
            frames = decoded(out / path)
            assert frames.shape == (8, 32, 32, 3)
            seen.add(frames.tobytes())
        assert sorted(str(path.relative_to(out)) for path in (out / part).rglob("*.mp4")) == [path for path, _ in lines]
    assert len(seen) == 30  # validation shows other things
    readme = (out / "README.md").read_text()
    assert "| 2 | pass | 8 | 2 |" in readme
    assert "30 videos of 8 frames of 32 x 32" in readme


def test_command_goes_on_where_it_stopped_and_nowhere_else(tmp_path):
    pytest.importorskip("av")
    out = tmp_path / "clips"
    run(out, *SMALL)
    files = sorted(out.rglob("*.mp4"))
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    files[3].unlink()
    (out / "README.md").unlink()
    status, text = run(out, *SMALL)
    assert (status, "1 made now" in text) == (0, True)
    after = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [i != 3 for i in range(len(files))]
    assert before[3][1] == after[3][1]
    assert (out / "README.md").is_file()
    status, text = run(out, *SMALL, "--seed", 1)
    assert (status, "begun with seed 0" in text) == (2, True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "photo.jpg").write_text("")
    status, text = run(tmp_path / "else", *SMALL)
    assert (status, "not an empty folder" in text) == (2, True)


def test_processes_make_the_same_files(tmp_path):
    pytest.importorskip("av")
    options = Options(num=6, frames=4, size=16, val_share=0)
    told: list[int] = []
    build(tmp_path / "one", options)
    build(tmp_path / "two", options, num_workers=2, watch=told.append)
    one, two = (sorted((tmp_path / name).rglob("*.mp4")) for name in ("one", "two"))
    assert len(one) == 6
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    assert told == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "one" / "val.txt").exists()


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    (folder / "some").mkdir(parents=True)
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(folder / "some" / f"photo {number}.png")
    return folder


def test_command_splits_by_image_and_names_broken_ones(tmp_path, photographs):
    pytest.importorskip("av")
    out, actions = tmp_path / "clips", "pan_left,zoom_in_then_pan_up,pan_right"
    arguments = (out, "--images", photographs, "--num", 15, "--frames", 6, "--size", 32, "--actions", actions)
    status, text = run(*arguments, "--workers", 0)
    assert status == 0, text
    of = {
        part: Counter(path.name.rsplit("-", 1)[0] for path in (out / part).rglob("*.mp4")) for part in ("train", "val")
    }
    assert of["train"].keys() | of["val"].keys() == {f"photo_{number}" for number in range(5)}
    assert not of["train"].keys() & of["val"].keys()
    assert set(of["train"].values()) == {3}
    assert {path.name for path in (out / "train").iterdir()} == set(actions.split(","))
    assert decoded(next(out.rglob("*.mp4"))).shape == (6, 32, 32, 3)

    others = photographs.rename(tmp_path / "others")
    (others / "some" / "photo 0.png").write_bytes(b"no picture")
    status, text = run(tmp_path / "again", "--images", others, *arguments[3:], "--workers", 0)
    assert status == 1
    assert "photo 0.png: not an image" in text
    listed = [
        line for part in ("train", "val") for line in (tmp_path / "again" / f"{part}.txt").read_text().splitlines()
    ]
    assert len(listed) == 12
    assert all((tmp_path / "again" / line.rsplit(" ", 1)[0]).is_file() for line in listed)


def test_options_that_make_no_sense_are_named_together(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(ConfigError) as error:
        build(tmp_path, Options(num=0, frames=2, size=33, actions=("jump",), val_share=1.0, fps=0))
    for word in ("--num", "--frames", "--size", "jump", "--val-share", "--fps"):
        assert word in str(error.value)
    with pytest.raises(ConfigError, match="no images"):
        build(tmp_path / "out", Options(images=tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_photographs_of_scikit_image_are_there():
    pytest.importorskip("skimage")
    found = motion_clips.find_images(Path("skimage"))
    assert len(found) == len(motion_clips.SKIMAGE)
