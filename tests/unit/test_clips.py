"""Which frames are seen, how clips are cut, and what a batch of videos looks like."""

import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2e.videos import write_video
from openeva.config import ConfigError, validate
from openeva.data.batches import BatchMaker
from openeva.data.clips import ClipSpec, ViewsConfig, clip_indices, random_indices
from openeva.data.loader import EvalLoader, TooManyBrokenError, TrainLoader
from openeva.data.mixture import Mixture
from openeva.data.sources import video_folder, video_list, webdataset
from openeva.data.sources.base import Sample
from openeva.data.video import Video
from openeva.data.views import CropConfig, ViewSpec

CENTRE = CropConfig(kind="center", hflip=0, crop_pct=1.0, interpolation="bilinear", antialias=False)


# ------------------------------------------------------------------------------------------------------ sampling


@given(length=st.integers(1, 400), num_frames=st.integers(1, 32), num_clips=st.integers(1, 5))
def test_frames_of_a_test_are_in_order_and_spread_evenly(length: int, num_frames: int, num_clips: int) -> None:
    clips = clip_indices(length, num_frames, num_clips)
    assert clips.shape == (num_clips, num_frames)
    assert 0 <= clips.min() <= clips.max() < length
    assert (np.diff(clips, axis=1) >= 0).all()
    assert (np.diff(clips, axis=0) >= 0).all()  # later clips take later frames of each segment
    if length >= num_frames * num_clips:
        assert len(np.unique(clips)) == clips.size
    steps = np.diff(clips, axis=1)
    assert not steps.size or steps.max() - steps.min() <= 1


def test_training_takes_every_place_of_each_segment_equally_often() -> None:
    rng, length, num_frames = random.Random(0), 43, 8
    drawn = np.stack([random_indices(length, num_frames, rng) for _ in range(4000)])
    assert (drawn // 5 == np.arange(8)).all()  # the last 3 frames are never seen
    counts = np.bincount((drawn % 5).flatten(), minlength=5)
    assert np.abs(counts - 6400).max() < 6 * np.sqrt(6400)


def test_views_are_the_same_every_time_but_for_the_official_ones() -> None:
    even, official = (ViewsConfig(num_clips=4, sampling=s).spec(16) for s in ("central", "official_random"))
    one, other = random.Random(1), random.Random(2)
    assert np.array_equal(even.indices(300, one), even.indices(300, other))
    assert not np.array_equal(official.indices(300, one), official.indices(300, other))
    assert np.array_equal(official.indices(300, random.Random(3)), official.indices(300, random.Random(3)))


def test_official_views_have_a_seed(folder: Path) -> None:
    source = validate(video_folder.Config, {"root": folder}).build()

    def seen(seed: int) -> Any:
        views = ViewsConfig(num_clips=4, sampling="official_random", seed=seed)
        return next(iter(loader(source, views.spec(2))))["image"]

    assert torch.equal(seen(0), seen(0))
    assert torch.equal(seen(1), seen(1))
    assert not torch.equal(seen(0), seen(1))


def test_shuffled_frames_are_the_same_in_another_order() -> None:
    plain, shuffled = (ClipSpec(16, shuffled=s).indices(300, random.Random(0)) for s in (False, True))
    assert not np.array_equal(plain, shuffled)
    assert np.array_equal(plain, np.sort(shuffled))


# ---------------------------------------------------------------------------------------------------------- crops


def clip_of(height: int, width: int, num_frames: int = 3) -> np.ndarray:
    """Frames whose red is the row, whose green the column and whose blue the frame."""
    y, x = np.mgrid[:height, :width]
    return np.stack([np.stack([y, x, np.full_like(y, 50 * t)], -1) for t in range(num_frames)]).astype(np.uint8)


def test_all_frames_are_cut_and_jittered_alike() -> None:
    crop = CropConfig(kind="multiscale", interpolation="bilinear", antialias=False, color_jitter=0.4, grey_prob=0.3)
    still = clip_of(60, 80)[:1].repeat(5, axis=0)
    seen = set()
    for seed in range(20):
        rng = random.Random(seed)
        view = crop.cut(still, crop.draw(60, 80, rng, (32, 32)), (32, 32))
        view = torch.from_numpy(crop.jitter(view.movedim(1, -1).numpy(), rng))
        assert view.shape == (5, 32, 32, 3)
        assert (view == view[:1]).all()
        seen.add(view[0].numpy().tobytes())
    assert len(seen) == 20


def test_jitter_comes_as_often_as_it_should() -> None:
    crop = CropConfig(color_jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, grey_prob=0.2)
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    results = [crop.jitter(image, random.Random(seed)) for seed in range(600)]
    changed = np.mean([not np.array_equal(result, image) for result in results])
    grey = np.mean([bool((result == result[..., :1]).all()) for result in results])
    assert changed == pytest.approx(1 - 0.2 * 0.8, abs=0.05)
    assert grey == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("size", "corners"), [((40, 60), [(0, 0), (0, 20), (0, 10)]), ((61, 40), [(0, 0), (20, 0), (10, 0)])]
)
def test_three_crops_lie_along_the_longer_side(size: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    views = CENTRE.three_cuts(clip_of(*size), (40, 40))
    assert views.shape == (3, 3, 3, 40, 40)
    assert [(int(v[0, 0, 0, 0]), int(v[0, 1, 0, 0])) for v in views] == corners


# ---------------------------------------------------------------------------------------- sources and batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        path = tmp_path / f"class {number % 2}" / f"video  {number}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, [30 * number + frame for frame in range(12)], size=32)
    return tmp_path


def loader(source: Any, clip: ClipSpec | None, **options: Any) -> EvalLoader:
    return EvalLoader(Mixture([source], [1.0]), ViewSpec((16, 16), clip=clip), CENTRE, batch_size=4, **options)


def test_one_source_serves_models_of_images_and_of_clips(folder: Path) -> None:
    source = validate(video_folder.Config, {"root": folder}).build()
    clips = list(loader(source, ClipSpec(4)))
    assert [tuple(batch["image"].shape) for batch in clips] == [(4, 4, 3, 16, 16), (2, 4, 3, 16, 16)]
    greys_BT = clips[0]["image"].float().mean((2, 3, 4))
    assert clips[0]["name"] == [source.name_of(number) for number in range(4)]
    assert greys_BT[2].tolist() == pytest.approx([120 + n for n in (1, 4, 7, 10)], abs=3)  # "video  4"
    images = next(iter(loader(source, None)))["image"]
    assert images.shape == (4, 3, 16, 16)
    assert images[0].float().mean() == pytest.approx(6, abs=3)  # the frame in the middle of the first video


def test_views_of_a_video_come_crop_by_crop_then_clip_by_clip(folder: Path) -> None:
    source = validate(video_folder.Config, {"root": folder}).build()
    batch = next(iter(loader(source, ClipSpec(2, num_clips=3, num_crops=3))))
    assert batch["image"].shape == (4, 9, 2, 3, 16, 16)
    single = [next(iter(loader(source, ClipSpec(2))))["image"]]
    by_crop = batch["image"].unflatten(1, (3, 3))
    assert torch.equal(by_crop[:, 0], by_crop[:, 1])  # square videos: all crops are alike
    assert torch.equal(by_crop[:, 2, 1], single[0])  # the clip in the middle is the only one of a single view
    assert by_crop[0, 0, 0].float().mean() < by_crop[0, 0, 2].float().mean()  # later clips are brighter


def test_lists_name_videos_as_the_official_ones_do(folder: Path) -> None:
    (folder / "list.txt").write_text("class 0/video  0.mp4 1\n\nclass 1/video  1.mp4 0\n")
    (folder / "labels.csv").write_text("id,name\n0,jumping\n1,air drumming")
    source = validate(video_list.Config, {"file": folder / "list.txt", "labels": folder / "labels.csv"}).build()
    assert source.class_names == ["jumping", "air drumming"]
    assert source.labels().tolist() == [1, 0]
    assert source.name_of(0) == str(folder / "class 0" / "video  0.mp4")
    assert len(next(iter(loader(source, ClipSpec(2))))["name"]) == 2
    (folder / "list.json").write_text(
        '[{"filename": "class 0/video  0.mp4", "label": [2]}, {"frame_dir": "x", "label": 0}]'
    )
    other = validate(video_list.Config, {"file": folder / "list.json", "root": folder}).build()
    assert (other.num_classes, other.labels().tolist()) == (3, [2, 0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a.mp4\nb.mp4 x\nc.mp4 1\n", ["list.txt:1: 'a.mp4' is not `path label`", "list.txt:2:"]),
        ("", ["names no videos"]),
        ("a.mp4 5\n", ["has the label 5, but there are 2 classes"]),
    ],
)
def test_lists_that_make_no_sense_say_where(text: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "labels.csv").write_text("id,name\n0,a\n1,b\n")
    with pytest.raises(ConfigError) as error:
        validate(video_list.Config, {"file": tmp_path / "list.txt", "labels": tmp_path / "labels.csv"}).build()
    assert all(part in str(error.value) for part in told)


def test_a_labels_file_must_count_from_zero(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    for content in ("id,name\n1,a\n", "a,b\n0,x\n", "id,name\n0,a\n0,b\n"):
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(ConfigError, match=r"labels\.csv"):
            validate(video_list.Config, {"file": tmp_path / "list.txt", "labels": tmp_path / "labels.csv"}).build()


def test_shards_may_hold_videos(folder: Path) -> None:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, path in enumerate(sorted(folder.rglob("*.mp4"))):
            (folder / "label").write_text(str(number % 2))
            tar.add(path, f"{number:03d}.mp4")
            tar.add(folder / "label", f"{number:03d}.cls")
    source = validate(webdataset.Config, {"shards": [str(folder / "shard.tar")], "num_classes": 2}).build()
    assert source.has_videos
    batch = next(iter(loader(source, ClipSpec(3))))
    assert batch["image"].shape == (4, 3, 3, 16, 16)
    assert batch["label"].tolist() == [0, 1, 0, 1]


def test_broken_videos_are_skipped_counted_and_named(folder: Path) -> None:
    bad = folder / "class 0" / "bad.mp4"
    bad.write_bytes((folder / "class 0" / "video  0.mp4").read_bytes()[:300])
    source = validate(video_folder.Config, {"root": folder}).build()
    measured = loader(source, ClipSpec(2), max_broken=0.5)
    assert sum(len(batch["image"]) for batch in measured) == 6
    assert list(measured.broken) == [str(bad)]
    training = TrainLoader(
        Mixture([source], [1.0]), ViewSpec((16, 16), clip=ClipSpec(2, "random")), CENTRE, batch_size=7, max_broken=0.9
    )
    step = next(training.batches())[0]
    assert step["image"].shape == (7, 2, 3, 16, 16)
    assert list(training.broken) == [str(bad)]
    strict = TrainLoader(
        Mixture([source], [1.0]), ViewSpec((16, 16), clip=ClipSpec(2, "random")), CENTRE, batch_size=7, max_broken=0.0
    )
    with pytest.raises(TooManyBrokenError, match=r"bad\.mp4"):
        for _ in zip(range(3), strict.batches(), strict=False):
            pass


def test_a_clip_cannot_be_made_of_an_image() -> None:
    maker = BatchMaker(ViewSpec((16, 16), clip=ClipSpec(2)), CENTRE)
    image = Sample(Video(b"").data, "picture.png")  # encoded bytes
    with pytest.raises(OSError, match=r"an image, but this task sees videos: 'picture\.png'"):
        maker.put(maker.empty(1), 0, image, 0, 0)
    with pytest.raises(ValueError, match="randaugment is for images"):
        BatchMaker(ViewSpec((16, 16), clip=ClipSpec(2)), CropConfig(randaugment="rand-m9-mstd0.5-inc1"))
