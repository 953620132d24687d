from collections import Counter

import numpy as np
import pytest

from openeva.data import scene as drawn
from openeva.data.sources import elpv, scenes
from openeva.data.sources.base import Source


def test_scenes_depend_on_seed_and_index_alone():
    source = scenes.Config(num_images=50, size=32).build()
    assert isinstance(source, Source)
    assert len(source) == 50
    first = [np.asarray(source.read(i).image) for i in range(5)]
    again = [np.asarray(scenes.Config(num_images=9, size=32).build().read(i).image) for i in range(5)]
    other = [np.asarray(scenes.Config(num_images=9, size=32, seed=1).build().read(i).image) for i in range(5)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all((a != b).any() for a, b in zip(first, other, strict=True))
    assert all((a != b).any() for a, b in zip(first[1:], first[:-1], strict=True))


def test_labels_are_balanced_and_name_the_front_object():
    source = scenes.Config(num_images=2000).build()
    found = [source.read(i) for i in range(0, 2000, 5)]
    counts = Counter(sample.label for sample in found)
    assert set(counts) == set(range(source.num_classes))
    assert max(counts.values()) < 2.2 * min(counts.values())
    for sample in found:
        things = sample.extra["scene"].things
        assert sample.label == drawn.SHAPES.index(things[-1].shape)
        assert all(thing.radius < things[-1].radius for thing in things[:-1])


@pytest.mark.parametrize("size", [(48, 48), (30, 70), (70, 30), (1, 1)])
def test_any_size(size):
    image = drawn.render(drawn.draw_scene(0, 3), size)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


def test_size_does_not_change_the_content():
    ground = drawn.Texture("gradient", ("red", "blue"), 0.5, 0.3)
    thing = drawn.Thing("disc", drawn.Texture("plain", ("white", "black"), 0.5, 0.0), 0.1, -0.2, 0.5, 0.0)
    scene = drawn.Scene(ground, (thing,), 0.0, 0)
    small, large = drawn.render(scene, (32, 32)).astype(float), drawn.render(scene, (128, 128)).astype(float)
    shrunk = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 2


@pytest.mark.parametrize("shape", drawn.SHAPES)
def test_objects_cover_the_pixels_they_change(shape):
    """`coverage`, from which masks and boxes follow, agrees with the picture."""
    ground = drawn.Texture("plain", ("black", "black"), 1.0, 0.0)
    thing = drawn.Thing(shape, drawn.Texture("plain", ("white", "white"), 1.0, 0.0), 0.05, -0.1, 0.7, 0.4)
    share = drawn.coverage(thing, (64, 64))
    picture = drawn.render(drawn.Scene(ground, (thing,), 0.0, 0), (64, 64))[:, :, 0].astype(float)
    expected = 28 + share * (243 - 28)
    assert np.abs(picture - expected).max() < 1.01
    assert 0.05 < share.mean() < 0.45
    assert ((share > 0.02) & (share < 0.98)).mean() < 0.12  # outlines are about a pixel wide
    distance = np.hypot(*np.mgrid[0:64, 0:64] - np.array([31.5 + 1.6, 31.5 - 3.2])[:, None, None]) / 32
    assert share[distance > 0.7 * 1.5].max() == 0  # `render` draws only within this reach


def test_objects_of_all_shapes_differ():
    masks = [
        drawn.coverage(drawn.Thing(s, drawn.Texture("plain", ("red", "red"), 1.0, 0.0), 0.0, 0.0, 0.7, 0.0), (32, 32))
        > 0.5
        for s in drawn.SHAPES
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.86


def test_elpv_has_all_photographs_and_a_stable_stratified_split():
    everything, train, val = (elpv.Config(split=split).build() for split in ("all", "train", "val"))
    assert len(everything) == 2624 == len(train) + len(val)
    assert len(val) == 525
    names = [{source.read(i).name for i in range(len(source))} for source in (train, val)]
    assert not names[0] & names[1]
    share = [np.mean([source.read(i).label for i in range(len(source))]) for source in (train, val)]
    assert share[0] == pytest.approx(share[1], abs=0.005)
    assert [val.read(i).name for i in range(3)] == [f"elpv/images/cell{n}.png" for n in ("0006", "0013", "0025")]
    larger = elpv.Config(split="val", val_fraction=0.3).build()
    assert names[1] <= {larger.read(i).name for i in range(len(larger))}
    sample = everything.read(0)
    assert sample.label == 1
    assert sample.extra == {"probability": 1.0, "type": "mono"}
    assert "CC BY-NC-SA 4.0" in elpv.LICENCE


def test_elpv_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'openeva\[demo\]'"):
        elpv.Config().build()
