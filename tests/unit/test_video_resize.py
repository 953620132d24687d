"""`openeva data videos`: small videos that show what the large ones do, at the same times."""

import os
import signal
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openeva.cli import app
from openeva.config import ConfigError
from openeva.data import video_resize
from openeva.data.building import BrokenInputError, run_jobs
from openeva.data.video_resize import Options, Resized, resize_folder, summary_of, target_size
from openeva.data.video_writer import write_video

av = pytest.importorskip("av")

CORNERS = np.array([[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (128, 128, 128)]], np.uint8)
"""Red, blue; green, grey."""


def make(
    path: Path, size: tuple[int, int] = (48, 64), times: Sequence[int] = range(10), clock: Fraction = Fraction(1, 10),
    rotation: int = 0, sound: bool = False,
) -> Path:  # fmt: skip
    """A video of four quarters of different colours, the last a grey by which frames are told from each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = CORNERS.repeat(size[0] // 2, 0).repeat(size[1] // 2, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = clock
        if rotation:
            stream.set_display_rotation(rotation)
        voice = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number, when in enumerate(times):
            picture[size[0] // 2 :, size[1] // 2 :] = 128 - 8 * (number % 8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = when, clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(voice.encode(samples))
            container.mux(voice.encode(None))
    return path


def read(path: Path) -> tuple[np.ndarray, list[float]]:
    """Frames and their times."""
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        frames = list(container.decode(video=0))
    assert not any(frame.rotation for frame in frames)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


def quarters(frame: np.ndarray) -> np.ndarray:
    """Colours in the middles of the four quarters."""
    rows, columns = frame.shape[:2]
    return frame[rows // 4 :: rows // 2, columns // 4 :: columns // 2][:2, :2].astype(int)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "videos", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("resize", "upscale", "size", "expected"),
    [
        ("256", False, (720, 1280), (256, 456)),  # 455.1
        ("256", False, (1280, 720), (456, 256)),
        ("256", False, (240, 320), (240, 320)),
        ("256", False, (181, 321), (180, 320)),  # even, and not larger
        ("256", True, (240, 320), (256, 342)),
        ("340x256", False, (720, 1280), (256, 340)),
        ("340x256", False, (1280, 720), (340, 256)),
        ("340x256", False, (500, 500), (256, 340)),
        ("340x256", False, (128, 1280), (128, 170)),
        ("340x256", True, (128, 1280), (256, 340)),
        ("256", False, (1, 1), (2, 2)),
    ],
)
def test_sizes(resize, upscale, size, expected):
    assert target_size(size, Options(resize, upscale=upscale)) == expected


def test_videos_become_small_at_the_same_places_and_times(tmp_path):
    make(tmp_path / "videos" / "air drumming" / "a b.mp4", (96, 128))
    make(tmp_path / "videos" / "deep" / "er" / "c.mkv", (128, 96), sound=True)
    (tmp_path / "videos" / "train.txt").write_text("deep/er/c.mkv 3\n")
    status, text = run(tmp_path / "videos", tmp_path / "small", "--resize", 48, "--workers", 0)
    assert status == 0, text
    assert "2 of 2 videos re-encoded" in text
    assert sorted(str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*.*")) == [
        "air drumming/a b.mp4", "deep/er/c.mp4", "videos.json",
    ]  # fmt: skip
    for name, size in {"air drumming/a b.mp4": (48, 64), "deep/er/c.mp4": (64, 48)}.items():
        frames, times = read(tmp_path / "small" / name)
        assert frames.shape == (10, *size, 3)
        assert np.abs(quarters(frames[0]) - CORNERS).max() < 12
        assert times == pytest.approx([number / 10 for number in range(10)])
    assert (tmp_path / "videos" / "train.txt").read_text() == "deep/er/c.mkv 3\n"


def test_the_summary_says_how_much_smaller_they_became():
    resized = Resized(
        total=6, made=3, skipped=2, bytes_before=30_000_000, bytes_after=4_000_000, broken={"a.mp4": "why"}
    )
    expected = "3 of 6 videos re-encoded, 30.0 MB -> 4.0 MB (7.5 times smaller); 2 were there already; 1 are broken"
    assert summary_of(resized) == expected


def test_uneven_times_are_kept(tmp_path):
    ticks = [500, 503, 504, 530, 531, 580, 583, 600, 601, 690]
    for name in ("a.mp4", "b.mkv"):
        make(tmp_path / "videos" / name, times=[33 * tick for tick in ticks], clock=Fraction(1, 1000))
    resize_folder(tmp_path / "videos", tmp_path / "small", Options("32"))
    for name in ("a.mp4", "b.mp4"):
        frames, times = read(tmp_path / "small" / name)
        assert frames.shape == (10, 32, 42, 3)
        assert times == pytest.approx([0.033 * (tick - 500) for tick in ticks], abs=1e-3)


def test_fewer_frames_per_second_and_none_twice(tmp_path):
    videos = tmp_path / "videos"
    make(videos / "fast.mp4", times=range(20), clock=Fraction(1, 30))  # is over before 0.7
    make(videos / "slow.mp4", times=range(5), clock=Fraction(1, 2))
    make(videos / "uneven.mkv", times=[0, 99, 132, 330, 363, 990], clock=Fraction(1, 1000))
    make(videos / "rounded.mkv", times=[0, 34, 67, 101, 134, 167, 201, 234, 267, 301], clock=Fraction(1, 1000))
    resize_folder(videos, tmp_path / "small", Options(fps=10))
    times = {path.stem: read(path)[1] for path in (tmp_path / "small").glob("*.mp4")}
    assert times["fast"] == pytest.approx([tick / 10 for tick in range(7)])
    assert times["slow"] == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert times["uneven"] == pytest.approx([0, 0.1, 0.2, 0.4, 1.0])
    for name, num in {"fast": 7, "rounded": 4}.items():
        frames, _ = read(tmp_path / "small" / f"{name}.mp4")
        numbers = [(128 - frame[-8:, -8:].mean()) / 8 for frame in frames]
        assert numbers == pytest.approx([3 * tick % 8 for tick in range(num)], abs=0.4)


@pytest.mark.parametrize(
    ("rotation", "turns"), [(90, 1), (-90, 3), (180, 2)], ids=["counterclockwise", "clockwise", "upside down"]
)
def test_videos_are_turned_upright(tmp_path, rotation, turns):
    """A display matrix of 90 degrees asks for a turn against the clock, as `np.rot90` does it."""
    make(tmp_path / "videos" / "phone.mp4", (48, 96), rotation=rotation)
    resize_folder(tmp_path / "videos", tmp_path / "small", Options("32"))
    frames, _ = read(tmp_path / "small" / "phone.mp4")
    assert frames.shape[1:3] == ((64, 32) if turns % 2 else (32, 64))
    assert np.abs(quarters(frames[0]) - np.rot90(CORNERS, turns)).max() < 12


def test_key_frames_are_as_frequent_as_asked(tmp_path):
    make(tmp_path / "videos" / "a.mp4", times=range(40))
    resize_folder(tmp_path / "videos", tmp_path / "small", Options(keyframe_every=6))
    with av.open(str(tmp_path / "small" / "a.mp4")) as container:
        keys = [bool(frame.key_frame) for frame in container.decode(video=0)]
    assert len(keys) == 40
    assert all(any(keys[start : start + 6]) for start in range(35))


def test_what_is_done_is_not_done_again(tmp_path):
    for name in "abc":
        make(tmp_path / "videos" / f"{name}.mp4")
    told: list[int] = []
    first = resize_folder(tmp_path / "videos", tmp_path / "small", Options("32"), watch=told.append)
    assert (first.made, first.skipped, told) == (3, 0, [0, 1, 2, 3])
    files = sorted((tmp_path / "small").glob("*.mp4"))
    before = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    told.clear()
    second = resize_folder(tmp_path / "videos", tmp_path / "small", Options("32"), watch=told.append)
    assert (second.made, second.skipped, told) == (1, 2, [2, 3])
    assert [old == file.stat().st_mtime_ns for old, file in zip(before, files, strict=True)] == [True, False, True]
    status, text = run(tmp_path / "videos", tmp_path / "small", "--resize", 48)
    assert (status, "begun with resize '32'" in text) == (2, True)


def test_broken_files_are_named_and_the_others_done(tmp_path):
    videos = tmp_path / "videos"
    whole = make(videos / "whole.mp4")
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    write_video(videos / "cut.mp4", noise)  # its index stands in front, so that it opens
    with av.open(str(videos / "cut.mp4")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][29]
        end = packet.pos + packet.size  # between two frames, so that each of those that are left is whole
    (videos / "cut.mp4").write_bytes((videos / "cut.mp4").read_bytes()[:end])
    (videos / "torn.mp4").write_bytes((videos / "cut.mp4").read_bytes()[: end - packet.size // 2])
    (videos / "empty.webm").write_bytes(b"")
    (videos / "text.avi").write_text("no video")
    (videos / "twice.mkv").write_bytes(whole.read_bytes())
    (videos / "twice.mp4").write_bytes(whole.read_bytes())
    (videos / ".hidden.mp4").write_text("no video")
    (videos / "gone.mp4").symlink_to(videos / "nowhere.mp4")
    status, text = run(videos, tmp_path / "small", "--workers", 0)
    assert status == 1
    assert "2 of 8 videos re-encoded" in text
    assert "6 are broken" in text
    listed = dict(line.split("\t") for line in (tmp_path / "small" / "broken.txt").read_text().splitlines())
    assert sorted(listed) == ["cut.mp4", "empty.webm", "gone.mp4", "text.avi", "torn.mp4", "twice.mp4"]
    assert "cut off: 30 of 60 frames" in listed["cut.mp4"]
    assert "cut off" in listed["torn.mp4"] or "broken one" in listed["torn.mp4"]  # by the decoder's threads
    assert listed["empty.webm"] == "the file is empty"
    assert "broken one" in listed["text.avi"]
    assert "twice.mkv" in listed["twice.mp4"]
    assert "No such file" in listed["gone.mp4"]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "broken.txt", "twice.mp4", "videos.json", "whole.mp4",
    ]  # fmt: skip
    assert all(f"skipped {name}" in text for name in listed)

    for name in listed:
        (videos / name).unlink()
    assert run(videos, tmp_path / "small", "--workers", 0)[0] == 0
    assert not (tmp_path / "small" / "broken.txt").exists()


def test_places_and_options_that_make_no_sense_are_named(tmp_path):
    videos = make(tmp_path / "videos" / "a.mp4").parent
    for out in (videos, videos / "small", tmp_path):
        with pytest.raises(ConfigError, match="lie in each other"):
            resize_folder(videos, out, Options())
    with pytest.raises(ConfigError, match="no folder"):
        resize_folder(tmp_path / "nowhere", tmp_path / "small", Options())
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no videos below"):
        resize_folder(tmp_path / "none", tmp_path / "small", Options())
    with pytest.raises(ConfigError) as error:
        resize_folder(videos, tmp_path / "small", Options("255", fps=-1, crf=99))
    assert all(word in str(error.value) for word in ("'255'", "--fps", "crf 99"))
    assert not (tmp_path / "small").exists()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "val.txt").write_text("lists may lie there already")
    assert resize_folder(videos, tmp_path / "small", Options()).made == 1


def test_links_to_folders_are_followed_once(tmp_path):
    make(tmp_path / "elsewhere" / "a.mp4")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "videos")
    assert video_resize.find_videos(tmp_path / "videos") == ["class/a.mp4"]


# ---------------------------------------------------------------------------------------------- processes


def work(job: str) -> int:
    """What a worker of the tests does."""
    match job:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os._exit(7)
        case "broken":
            raise BrokenInputError("it is broken")
        case "bug":
            raise KeyError("a bug")
        case _ if job.startswith("/"):
            try:
                Path(job).touch()
                time.sleep(100)
            finally:
                Path(job).unlink()
    return os.getpid()


def test_a_crash_takes_only_its_own_file(tmp_path):
    jobs = ["1", "die", "2", "broken", "leave", "3"]
    outcomes = list(run_jobs(work, jobs, 2))
    assert sorted(outcome.job for outcome in outcomes) == sorted(jobs)
    done = [outcome.result for outcome in outcomes if outcome.job.isdigit()]
    assert os.getpid() not in done
    problems = {outcome.job: outcome.problem for outcome in outcomes if outcome.problem}
    assert problems == {
        "die": "the process that worked on it crashed (signal SIGKILL)", "broken": "it is broken",
        "leave": "the process that worked on it crashed (exit status 7)",
    }  # fmt: skip


def test_bugs_are_not_taken_for_broken_files():
    for num_workers in (0, 1):
        with pytest.raises(KeyError, match="a bug"):
            list(run_jobs(work, ["1", "bug"], num_workers))


def test_leaving_early_stops_all_processes_and_they_tidy_up(tmp_path):
    begin = time.monotonic()
    unfinished = tmp_path / "unfinished"
    outcomes = run_jobs(work, ["1", str(unfinished), "2"], 2)
    first = next(outcomes)
    while not unfinished.exists() and time.monotonic() - begin < 60:
        time.sleep(0.01)
    assert unfinished.exists()
    outcomes.close()
    assert not unfinished.exists()
    assert time.monotonic() - begin < 60
    with pytest.raises(ProcessLookupError):
        os.kill(first.result, 0)


def test_videos_are_resized_in_processes(tmp_path):
    for name in "abc":
        make(tmp_path / "videos" / f"{name}.mp4")
    (tmp_path / "videos" / "d.mp4").write_text("no video")
    one = resize_folder(tmp_path / "videos", tmp_path / "one", Options("32"))
    two = resize_folder(tmp_path / "videos", tmp_path / "two", Options("32"), num_workers=2)
    assert (two.made, list(two.broken)) == (3, ["d.mp4"])
    assert (one.bytes_before, one.broken) == (two.bytes_before, two.broken)
    for name in "abc":
        assert (read(tmp_path / "one" / f"{name}.mp4")[0] == read(tmp_path / "two" / f"{name}.mp4")[0]).all()


def test_interrupting_keeps_what_is_finished(tmp_path):
    for name in "abc":
        make(tmp_path / "videos" / f"{name}.mp4")
    (tmp_path / "videos" / "0.mp4").write_text("no video")

    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resize_folder(tmp_path / "videos", tmp_path / "small", Options("32"), watch=interrupt)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["a.mp4", "broken.txt", "videos.json"]
    assert resize_folder(tmp_path / "videos", tmp_path / "small", Options("32")).skipped == 1


def test_a_full_disk_stops_everything(tmp_path, monkeypatch):
    for name in "ab":
        make(tmp_path / "videos" / f"{name}.mp4")

    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_resize, "_convert", full)
    with pytest.raises(OSError, match="No space left"):
        resize_folder(tmp_path / "videos", tmp_path / "small", Options())
