"""Reading videos: the frames that are asked for, whatever the file is like; and what is wrong with broken ones."""

import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from openeva.data import video as video_module
from openeva.data.video import Video, VideoError, decoder_problem

NUM_FRAMES, SIZE = 50, (48, 64)


def pictures() -> list[np.ndarray]:
    """A square that wanders over a gradient that brightens: no two frames are alike."""
    frames = []
    for number in range(NUM_FRAMES):
        frame = np.linspace(20, 120, SIZE[1], dtype=np.float32)[None, :, None].repeat(SIZE[0], 0).repeat(3, 2)
        frame += 2 * number
        frame[8:24, number : number + 14] = (250, 30, 30)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return frames


def write(
    path: Path, *, codec: str = "libx264", times: list[int] | None = None, rotation: int = 0, sound: bool = False,
    container: dict[str, str] | None = None, options: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Frames at `times` (in hundredths of a second), every tenth of a second by default, key frames every 12."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.options = 12, options or {}
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        if rotation:
            stream.set_display_rotation(rotation)
        audio: Any = out.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number, picture in enumerate(pictures()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else 10 * number), Fraction(1, 100)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if audio is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            out.mux(audio.encode(tone))
            out.mux(audio.encode())
    return path


def every_frame(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read(path: Path | bytes, indices: Any, **options: Any) -> np.ndarray:
    with Video(path, **options).opened() as video:
        return video.frames(indices)


# ------------------------------------------------------------------------------------------------------- frames

FILES: dict[str, Callable[[Path], Path]] = {
    "h264 in mp4": lambda folder: write(folder / "a.mp4"),
    "with sound": lambda folder: write(folder / "a.mp4", sound=True),
    "many reordered frames": lambda folder: write(folder / "a.mp4", options={"bf": "4", "b_strategy": "0"}),
    "open groups of pictures": lambda folder: write(folder / "a.mp4", options={"x264-params": "open-gop=1:bframes=3"}),
    "matroska": lambda folder: write(folder / "a.mkv"),
    "transport stream": lambda folder: write(folder / "a.mts"),
    "mpeg4 in avi": lambda folder: write(folder / "a.avi", codec="mpeg4"),
    "vp9 in webm": lambda folder: write(folder / "a.webm", codec="libvpx-vp9"),
    "one key frame": lambda folder: write(folder / "a.mp4", options={"g": "1000"}),
    "varying frame rate": lambda folder: write(
        folder / "a.mp4", times=np.cumsum([3 + (7 * n) % 40 for n in range(NUM_FRAMES)]).tolist()
    ),
}


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FILES[request.param](tmp_path)


def test_frames_are_those_of_decoding_all(file: Path) -> None:
    expected, rng = every_frame(file), np.random.default_rng(0)
    assert len(expected) == NUM_FRAMES
    with Video(file).opened() as video:
        assert video.num_frames == NUM_FRAMES
        for _ in range(6):
            indices = rng.integers(0, NUM_FRAMES, 7)  # in any order, some twice
            assert np.array_equal(video.frames(indices), expected[indices])
        for number in (0, NUM_FRAMES - 1):
            assert np.array_equal(video.frames([number])[0], expected[number])


def test_a_file_may_come_as_bytes_and_travel_to_a_worker(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    shard = pickle.loads(pickle.dumps(Video(path.read_bytes(), "shard.tar:a")))
    assert shard.name == "shard.tar:a"
    with shard.opened() as video:
        assert np.array_equal(video.frames([30, 2]), every_frame(path)[[30, 2]])
    assert np.array_equal(read(path, [30, 2], threads=0), every_frame(path)[[30, 2]])


def test_few_frames_need_few_to_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, shown = [], []
    decode, convert = video_module._PyAvVideo._decode, video_module._upright_rgb

    def counted(self: Any, wanted: set[int]) -> Iterator[Any]:
        for frame in decode(self, wanted):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module._PyAvVideo, "_decode", counted)
    monkeypatch.setattr(video_module, "_upright_rgb", lambda *args: shown.append(0) or convert(*args))
    path = write(tmp_path / "a.mp4", options={"bf": "0", "sc_threshold": "0"})
    read(path, [37])
    assert len(decoded) == 2  # a key frame every 12: 36, 37
    assert len(shown) == 1
    decoded.clear()
    read(path, [1, 38, 13])
    assert len(decoded) == 2 + 2 + 3
    reordered = write(
        tmp_path / "b.mp4", options={"bf": "3", "b_strategy": "0", "b-pyramid": "none", "sc_threshold": "0"}
    )
    decoded.clear()
    read(reordered, [11])
    assert len(decoded) < 8  # of 12: those that no other frame needs are left out
    decoded.clear()
    read(reordered, [38])
    assert len(decoded) < 6  # from the key frame at 36, not from the one before it


def test_times_follow_the_file_not_its_average_rate(tmp_path: Path) -> None:
    times = np.cumsum([3 + (7 * n) % 40 for n in range(NUM_FRAMES)])
    with Video(write(tmp_path / "a.mp4", times=times.tolist())).opened() as video:
        assert video.times == pytest.approx((times - times[0]) / 100, abs=1e-3)
        assert video.at(video.times[20] + 1e-3) == video.at(video.times[21] - 1e-3) == 20
        assert (video.at(-1), video.at(1e9)) == (0, NUM_FRAMES - 1)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_rotated_video_stands_upright(rotation: int, tmp_path: Path) -> None:
    flat, turned = write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", rotation=rotation)
    assert np.array_equal(read(turned, [5]), np.rot90(read(flat, [5]), rotation // 90, axes=(1, 2)))


def test_numbers_that_are_not_there_are_misuse(tmp_path: Path) -> None:
    with Video(write(tmp_path / "a.mp4")).opened() as video:
        for indices in ([NUM_FRAMES], [-1], []):
            with pytest.raises(ValueError, match="a video of 50"):
                video.frames(indices)


# -------------------------------------------------------------------------------------------------- broken files


def broken(path: Path) -> str:
    with pytest.raises(OSError, match=r".") as error:  # noqa: SIM117
        with Video(path).opened() as video:
            video.frames([0, video.num_frames - 1])
    assert error.value.filename == str(path)
    return error.value.strerror or ""


def test_broken_files_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert broken(tmp_path / "empty.mp4") == "the file is empty"
    (tmp_path / "text.mp4").write_text("no video at all")
    assert broken(tmp_path / "text.mp4").startswith("not a video, or a broken one")
    assert broken(tmp_path / "nowhere.mp4") == "No such file or directory"
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        audio: Any = out.add_stream("aac", rate=8000, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 8000
        out.mux(audio.encode(tone))
        out.mux(audio.encode())
    assert broken(tmp_path / "sound.mp4") == "it has no moving pictures, only sound"


@pytest.mark.parametrize("where", ["index behind the pictures", "index before the pictures"])
def test_a_file_that_was_cut_off_is_broken(where: str, tmp_path: Path) -> None:
    container = {"movflags": "faststart"} if where.startswith("index before") else {}
    whole = write(tmp_path / "whole.mp4", container=container)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    reason = broken(cut)
    assert "cut off" in reason if container else "broken" in reason


def test_damage_in_the_middle_is_told_or_bridged(tmp_path: Path) -> None:
    """Whatever the decoder makes of garbage: an error that names the file, or as many frames as were asked for."""
    content = bytearray(write(tmp_path / "a.mp4", container={"movflags": "faststart"}).read_bytes())
    start = len(content) // 2
    content[start : start + 400] = bytes(400)
    (tmp_path / "bad.mp4").write_bytes(content)
    try:
        assert read(tmp_path / "bad.mp4", range(0, NUM_FRAMES, 5)).shape == (10, *SIZE, 3)
    except VideoError as error:
        assert error.filename == str(tmp_path / "bad.mp4")  # noqa: PT017 (either may come)


def test_a_missing_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert "openeva[video]" in (decoder_problem("pyav") or "")
    monkeypatch.setitem(__import__("sys").modules, "torchcodec", None)
    assert "pip install torchcodec" in (decoder_problem("torchcodec") or "")


def test_titles_need_not_be_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "TITLETITLE"
        stream: Any = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 32
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    content = path.read_bytes()
    assert b"TITLETITLE" in content
    path.write_bytes(content.replace(b"TITLETITLE", b"\xff\xfe\xe9\xe8LETITL"))
    assert read(path, [0]).shape == (1, 32, 32, 3)


def test_frames_that_change_their_size_are_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([(48, 64, 3), (48, 64, 3), (24, 64, 3)])
    monkeypatch.setattr(video_module, "_upright_rgb", lambda *_: np.zeros(next(sizes), np.uint8))
    with pytest.raises(VideoError, match=r"change their size: .*a\.mp4"):
        read(write(tmp_path / "a.mp4"), [0, 1, 2])
