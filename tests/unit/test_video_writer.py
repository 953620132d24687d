"""Frames become files that other readers understand, whole or not at all."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

from openeva.data.video_writer import VideoWriter, write_video  # noqa: E402


def ramp(num: int, size: tuple[int, int] = (32, 48)) -> list[np.ndarray]:
    """Frames that differ in brightness, reddish on the left and blueish on the right."""
    frames = []
    for number in range(num):
        frame = np.full((*size, 3), 20 + 200 * number // num, np.uint8)
        frame[:, : size[1] // 2, 2] //= 2
        frame[:, size[1] // 2 :, 0] //= 2
        frames.append(frame)
    return frames


def read(path: Path) -> tuple[np.ndarray, list[float], list[bool]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return (
        np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames],
        [bool(frame.key_frame) for frame in frames],
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_frames_come_back_in_order_at_their_times(tmp_path, monkeypatch, codec):
    if codec == "mpeg4":  # an FFmpeg without x264
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    frames, path = ramp(30), tmp_path / "new folder" / "ramp.mp4"
    assert write_video(path, iter(frames), fps=10, keyframe_every=5) == 30
    found, times, keys = read(path)
    assert found.shape == (30, 32, 48, 3)
    assert np.abs(found.astype(int) - np.stack(frames)).mean() < 4
    assert times == pytest.approx([number / 10 for number in range(30)])
    assert all(any(keys[start : start + 5]) for start in range(0, 30, 5))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == (codec, 10, 30)
        assert container.duration == 3_000_000
    assert [file.name for file in path.parent.iterdir()] == ["ramp.mp4"]


def test_broadcast_rates_are_kept(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(4), fps=30000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_odd_sides_repeat_the_last_row_and_column(tmp_path):
    frame = np.zeros((31, 47, 3), np.uint8)
    frame[-8:] = 250
    frame[:, -8:] = 250
    write_video(tmp_path / "odd.mp4", [frame] * 3, crf=4)
    found, _, _ = read(tmp_path / "odd.mp4")
    assert found.shape == (3, 32, 48, 3)
    assert found[0, -1].min() > 230
    assert found[0, :, -1].min() > 230
    assert found[0, :20, :30].max() < 20


def test_equal_frames_give_equal_bytes_and_lower_quality_fewer(tmp_path):
    noise = list(np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8))
    for name, crf in {"a": 20, "b": 20, "c": 40}.items():
        write_video(tmp_path / f"{name}.mp4", noise, crf=crf)
    first, again, small = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert first == again
    assert len(small) < len(first) / 2


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="x264 notes its settings in the file")
@pytest.mark.parametrize(("columns", "setting"), [(126, b"mbtree=0"), (128, b"mbtree=1")])
def test_narrow_videos_do_without_what_makes_them_differ(tmp_path, columns, setting):
    write_video(tmp_path / "a.mp4", ramp(4, (32, columns)))
    assert setting in (tmp_path / "a.mp4").read_bytes()


def test_what_is_cut_short_leaves_nothing_and_the_old_file_alone(tmp_path):
    def failing():
        yield from ramp(90)  # more than the encoder looks ahead: some are on disk
        raise KeyboardInterrupt

    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt):
        write_video(path, failing())
    assert list(tmp_path.iterdir()) == []
    write_video(path, ramp(3))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_video(path, failing())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        ([np.zeros((8, 8, 3), np.float32)], "float32"),
        ([np.zeros((8, 8), np.uint8)], "rows, columns, 3"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], "all must have one size"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", iter(frames))
    assert list(tmp_path.iterdir()) == []


def test_values_that_no_encoder_takes_are_refused(tmp_path):
    for options, message in [
        ({"crf": 60}, "crf 60"),
        ({"fps": 0}, "fps 0"),
        ({"keyframe_every": 0}, "keyframe_every 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / "a.mp4", ramp(2), **options)
    with pytest.raises(ValueError, match="both sides must be even"):
        VideoWriter(tmp_path / "a.mp4", (31, 48), Fraction(1, 10), Fraction(10))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_video(tmp_path / "file" / "a.mp4", ramp(2))
