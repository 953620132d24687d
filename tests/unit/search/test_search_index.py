"""The index of a search: what is encoded again, and what survives interruption, damage and moves."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openeva.data.file_index import locked
from openeva.inference import Index, index_file, search
from openeva.inference.index_file import Files, Stamp
from searches import (
    NAMES,
    Direct,
    assert_as_made_anew,
    cli,
    clip,
    count_reads,
    indexed,
    names,
    put_image,
    saved,
    scores,
    stop_after,
)


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    return saved(tmp_path / "other", clip(seed=1))


@pytest.fixture
def read_images(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    return count_reads(monkeypatch)


# ---------------------------------------------------------------------------------------------------- what is encoded


def test_only_new_and_changed_images_are_encoded(photos: Path, weights: Path, read_images: list[bytes]) -> None:
    index = Index(photos, weights=weights)
    done = index.update()
    assert (done.num_new, done.num_images, len(index)) == (6, 6, 6)
    assert done.lines() == ["6 images in the index, 6 new"]
    assert len(read_images) == 6
    written = index.place.stat().st_mtime_ns
    assert Index(photos).update().lines() == ["6 images in the index"]
    assert index.place.stat().st_mtime_ns == written
    assert len(read_images) == 6
    put_image(photos / "new.png", 50)
    put_image(photos / "c.png", 51, side=24)
    os.utime(photos / "d.png", ns=(0, 1))  # a change that leaves the size as it is
    (photos / "b.jpg").unlink()
    (photos / "sub" / "e.png").rename(photos / "sub" / "renamed.png")
    done = Index(photos).update()
    assert (done.num_new, done.num_changed, done.num_removed, done.num_images) == (2, 2, 2, 6)
    assert done.lines() == ["6 images in the index, 2 new, 2 changed, 2 no longer there"]
    assert set(read_images[6:]) == {
        (photos / name).read_bytes() for name in ("new.png", "c.png", "d.png", "sub/renamed.png")
    }
    hits = Index(photos).search("a dog")
    assert set(names(hits, photos)) == {"a.png", "c.png", "d.png", "new.png", "sub/f.png", "sub/renamed.png"}
    assert_as_made_anew(photos, weights)


def test_rows_of_several_sources_are_put_together_in_pieces(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "COPIED_ROWS", 2)
    indexed(photos, weights)
    for number, name in enumerate(NAMES[::2]):
        put_image(photos / name, 60 + number, side=24)
    indexed(photos, weights)
    assert_as_made_anew(photos, weights)


def test_a_broken_image_is_named_once_and_tried_again_when_it_changes(
    photos: Path, weights: Path, read_images: list[bytes]
) -> None:
    whole = (photos / "c.png").read_bytes()
    (photos / "c.png").write_bytes(whole[:40])
    (photos / "d.png").write_bytes(b"")
    done = Index(photos, weights=weights).update()
    assert {Path(name).name for name in done.broken} == {"c.png", "d.png"}
    assert done.broken[str(photos / "d.png")] == "the file is empty"
    assert done.lines() == ["4 images in the index, 4 new, 2 not readable"]
    read_images.clear()
    written = Index(photos).place.stat().st_mtime_ns
    again = Index(photos).update()
    assert (again.broken, again.num_broken, read_images) == ({}, 2, [])
    assert Index(photos).place.stat().st_mtime_ns == written
    (photos / "c.png").write_bytes(whole)
    (photos / "d.png").unlink()
    mended = Index(photos).update()
    assert mended.lines() == ["5 images in the index, 1 changed, 1 no longer there"]
    assert "c.png" in names(Index(photos).search("a dog"), photos)


def test_a_file_that_cannot_be_opened_is_tried_every_time(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "c.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    with monkeypatch.context() as locked_away:
        locked_away.setattr(Path, "read_bytes", refused)
        locked_away.setattr(search, "_can_be_opened", lambda path: path.name != "c.png")
        for num_new in (5, 0):
            done = Index(photos, weights=weights).update()
            assert done.broken == {str(photos / "c.png"): "Permission denied"}
            assert (done.num_new, done.num_broken) == (num_new, 1)
    assert Index(photos).update().num_new == 1
    assert search._can_be_opened(photos / "c.png")
    assert not search._can_be_opened(photos / "gone.png")


def test_answers_that_are_not_finite_are_never_kept(photos: Path, weights: Path, tmp_path: Path) -> None:
    model = clip()
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc2.weight[:] = torch.nan
    broken = saved(tmp_path / "nan", model)
    done = Index(photos, weights=broken).update()
    assert done.num_images == 0
    assert set(done.broken.values()) == {"the model's answer is not finite; try precision fp32"}
    assert Index(photos).search("a dog") == []
    assert len(Index(photos).update().broken) == len(NAMES)
    assert Index(photos, weights=weights).update().num_images == len(NAMES)


# ---------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("part_rows", [1, 2, 100])
def test_what_is_done_before_ctrl_c_is_not_done_again(
    photos: Path, weights: Path, read_images: list[bytes], monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    monkeypatch.setattr(search, "PART_ROWS", part_rows)
    (photos / "b.jpg").write_bytes(b"broken")
    index = Index(photos, weights=weights, batch_size=1, num_readers=1)
    with pytest.raises(KeyboardInterrupt):
        index.update(stop_after(4))
    assert not index.place.exists()
    with pytest.raises(ValueError, match="no index"):
        index.search("a dog")
    read_images.clear()
    done = Index(photos, num_readers=1).update()  # the parts say which weights
    assert (done.num_new, done.broken, done.num_broken, done.num_images) == (2, {}, 1, 5)
    assert read_images == [(photos / name).read_bytes() for name in NAMES[4:]]
    assert [path.suffix for path in sorted(index.place.parent.iterdir())] == [".idx", ".lock"]
    assert_as_made_anew(photos, weights)


def test_a_change_between_interruption_and_resumption_counts(photos: Path, weights: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=weights, batch_size=1).update(stop_after(4))
    put_image(photos / "a.png", 70, side=28)
    (photos / "b.jpg").unlink()
    done = Index(photos, weights=weights).update()
    assert (done.num_new, done.num_changed, done.num_removed) == (2, 1, 1)
    assert_as_made_anew(photos, weights)


def test_many_parts_become_one(photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PART_ROWS", 1)
    monkeypatch.setattr(index_file, "MAX_PARTS", 2)
    for number in range(10):
        put_image(photos / f"more{number}.png", 100 + number)
    index = Index(photos, weights=weights, batch_size=1)
    most = 0

    def finished(done: int, _total: int, _broken: str | None) -> None:
        nonlocal most
        most = max(most, len(list(index.place.parent.glob("*.part-*"))))
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.update(finished)
    assert most == 2
    assert Index(photos).update().num_new == 2
    assert_as_made_anew(photos, weights)


KILLED = """
import os, signal, sys
from openeva.inference import Index, search
search.PART_ROWS = 2
def finished(done, total, broken):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Index(sys.argv[1], weights=sys.argv[2], batch_size=1, num_readers=1).update(finished)
"""


def test_killed_it_goes_on_from_the_last_part(photos: Path, weights: Path, read_images: list[bytes]) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, photos, weights], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Index(photos, num_readers=1).update().num_new == 2
    assert read_images == [(photos / name).read_bytes() for name in NAMES[4:]]
    assert len(Index(photos)) == len(NAMES)


def test_leftovers_are_taken_away_and_only_ones_own(
    photos: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "kept" / "my"
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=weights, place=place, batch_size=1).update(stop_after(4))
    part = place.with_name("my.part-000001")
    part.write_bytes(part.read_bytes()[:-3])
    leftovers = [place.with_name(f"my{kind}.123.0a1b2c3d.tmp") for kind in ("", ".part-000002")]
    others = [place.with_name(name) for name in ("my2.123.0a1b2c3d.tmp", "my.part-1.bak", "mine.part-000001")]
    for path in (*leftovers, *others):
        path.write_bytes(b"x")
    assert Index(photos, weights=weights, place=place).update().num_new == len(NAMES)
    assert f"{part} is damaged; its images are encoded again" in caplog.text
    assert {path.name for path in place.parent.iterdir()} == {"my", "my.lock", *(path.name for path in others)}


def test_the_second_process_waits_for_the_first(
    photos: Path, weights: Path, read_images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    indexes = [Index(photos, weights=weights) for _ in range(2)]
    waiting = threading.Thread(target=indexes[1].update)
    with locked(indexes[0].place):
        waiting.start()
        deadline = time.monotonic() + 20
        while "another process is indexing" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not read_images
    waiting.join()
    assert f"another process is indexing {photos}; waiting" in caplog.text
    assert indexes[0].update().num_new == 0
    assert len(read_images) == len(NAMES)
    assert len(indexes[0].search("a dog")) == len(NAMES)


# ---------------------------------------------------------------------------------------------------- other weights


def test_other_weights_make_it_anew_and_say_so(photos: Path, weights: Path, other_weights: Path) -> None:
    indexed(photos, weights)
    index = Index(photos, weights=other_weights, precision="fp32")
    with pytest.raises(
        ValueError, match=r"made with other weights \(.*run\) than .*other; make it anew .* or give those"
    ):
        index.search("a dog")
    done = index.update()
    assert (done.replaced, done.num_new, done.num_images) == (str(weights), len(NAMES), len(NAMES))
    assert done.lines()[0] == f"the index was of other weights ({weights}), so it was made anew"
    direct = Direct(other_weights)
    expected = direct.scores(photos, direct.text("a dog"))
    assert scores(Index(photos).search("a dog"), photos) == pytest.approx(expected, abs=1e-3)
    assert Index(photos).update().replaced is None


def test_until_it_is_complete_the_index_of_the_old_weights_stays(
    photos: Path, weights: Path, other_weights: Path, read_images: list[bytes]
) -> None:
    hits, direct = indexed(photos, weights).search("a dog"), Direct(other_weights)
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=other_weights, batch_size=1, precision="fp32").update(stop_after(4))
    assert Index(photos, weights=weights).search("a dog") == hits
    read_images.clear()
    done = Index(photos, weights=other_weights, num_readers=1, precision="fp32").update()
    assert (done.num_new, done.replaced, len(read_images)) == (2, str(weights), 2)
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=weights, batch_size=1).update(stop_after(4))
    assert Index(photos, weights=other_weights).update().lines() == ["6 images in the index"]
    assert Index(photos).update().lines() == ["6 images in the index"]
    expected = direct.scores(photos, direct.text("a dog"))  # and nothing of the part of the old weights
    assert scores(Index(photos).search("a dog"), photos) == pytest.approx(expected, abs=1e-3)


def test_weights_that_learnt_more_are_others_and_moved_ones_the_same(
    photos: Path, weights: Path, tmp_path: Path, read_images: list[bytes]
) -> None:
    indexed(photos, weights)
    read_images.clear()
    weights.rename(tmp_path / "moved")
    done = Index(photos, weights=tmp_path / "moved").update()
    assert (done.lines(), read_images) == (["6 images in the index"], [])
    assert Index(photos).weights == str(tmp_path / "moved")
    saved(tmp_path / "moved", clip(seed=3))
    done = Index(photos).update()
    assert (done.num_new, done.replaced) == (len(NAMES), str(tmp_path / "moved"))


# ---------------------------------------------------------------------------------------------------- files and folders


def test_a_moved_folder_takes_its_index_along(
    photos: Path, weights: Path, tmp_path: Path, read_images: list[bytes]
) -> None:
    place = tmp_path / "photos.idx"
    hits = indexed(photos, weights, place=place).search("a dog")
    read_images.clear()
    moved = photos.rename(tmp_path / "moved")
    assert names(Index(moved, place=place).search("a dog"), moved) == names(hits, photos)
    assert Index(moved, place=place).update().lines() == ["6 images in the index"]
    assert not read_images
    (tmp_path / "link").symlink_to(moved)
    assert len(Index(tmp_path / "link", place=place).search("a dog")) == len(NAMES)
    put_image(tmp_path / "others" / "x.png", 0)
    with pytest.raises(ValueError, match=r"photos\.idx is the index of .*moved, not of .*others; give another place"):
        Index(tmp_path / "others", place=place)


def test_an_empty_folder_is_told_and_does_not_cost_an_index(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images in this folder \(jpg, jpeg, png, .*\)$"):
        Index(tmp_path / "empty").update()
    place = indexed(photos, weights).place
    photos.rename(tmp_path / "elsewhere")
    photos.mkdir()  # as where a drive is not there
    with pytest.raises(ValueError, match=rf"photos: no images .*; the index of its 6 images is kept \({place}\)"):
        Index(photos).update()
    photos.rmdir()
    (tmp_path / "elsewhere").rename(photos)
    assert Index(photos).update().lines() == ["6 images in the index"]


def test_nothing_is_written_into_the_folder(photos: Path, weights: Path, cache: Path) -> None:
    before = sorted(photos.rglob("*")), photos.stat().st_mtime_ns
    index = indexed(photos, weights)
    assert (sorted(photos.rglob("*")), photos.stat().st_mtime_ns) == before
    assert index.place.parent == cache / "search"
    assert index.place.name.startswith("photos-")


def test_an_index_that_cannot_be_written(photos: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((ValueError, OSError), match=r"file.x\.idx"):
        Index(photos, weights=weights, place=tmp_path / "file" / "x.idx").update()


@pytest.mark.parametrize("there", [True, False])
def test_a_place_that_is_read_only(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    index = indexed(photos, weights)
    if not there:
        index.place.unlink()
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "w" in mode or "x" in mode:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(
        ValueError, match=r"\.idx: the index cannot be written there \(Read-only .*--index.*--no-update"
    ):
        Index(photos, weights=weights).update()
    if there:
        assert len(Index(photos).search("a dog")) == len(NAMES)


def test_a_full_disk_is_named(photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_file.ArrayFileWriter, "append", full)
    with pytest.raises(OSError, match=r"No space left on device.*photos-.*\.idx"):
        Index(photos, weights=weights).update()


def test_files_that_are_no_index_are_left_alone(photos: Path, weights: Path, tmp_path: Path) -> None:
    place = indexed(photos, weights, place=tmp_path / "good.idx").place
    good = place.read_bytes()
    other_format = tmp_path / "format.idx"
    files = Files([b"a"], np.ones(1, np.int64), np.ones(1, np.int64))
    index_file.write(other_format, files, [np.zeros((1, 4), np.float16)], {}, {})
    other_format.write_bytes(other_format.read_bytes().replace(b"openeva-search/1", b"openeva-search/9"))
    damaged = {
        "cut.idx": good[:-20], "tail.idx": good[200:], "empty.idx": b"",
        "footer.idx": good.replace(b'"arrays"', b'"arrayz"'),
        "json.idx": good.replace(b'{"arrays"', b'["arrays"'), "photo.png": (photos / "a.png").read_bytes(),
        "format.idx": other_format.read_bytes(),
        "dtype.idx": good.replace(b'"<f2"', b'"<i2"'), "names.idx": good.replace(b'"names.starts"', b'"names.starrs"'),
    }  # fmt: skip
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name} is damaged, or not an index of images; delete it .*\(--index\)$"
        ):
            Index(photos, weights=weights, place=tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(ValueError, match=r"run is a folder; give the file of an index"):
        Index(photos, place=weights)
    with pytest.raises(ValueError, match=r"x\.lock: files ending in \.lock are for locks"):
        Index(photos, weights=weights, place=tmp_path / "x.lock")


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_an_index_file_gives_back_what_was_written(tmp_path: Path, count: int) -> None:
    written = [b"folder/\xff%d.png" % number for number in range(count)]
    features = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float16)
    broken = {b"br\xfeken\n.png": (Stamp(3, 2**60), "why")}
    stamps = Files(written, np.arange(count), np.arange(count) + 2**60)
    index_file.write(tmp_path / "x.idx", stamps, [features[:2], features[2:]], broken, {"folder": "/x"})
    stored = index_file.read(tmp_path / "x.idx")
    assert stored is not None
    assert list(stored.files.names) == [stored.files.names[row] for row in range(count)] == written
    assert len(stored) == len(stored.files.names) == count
    assert [stored.files.stamp(row) for row in range(count)] == [Stamp(row, row + 2**60) for row in range(count)]
    assert (stored.features.size, stored.broken) == (count * 6, broken)
    np.testing.assert_array_equal(stored.features, features if count else np.empty((0, 0)))
    assert stored.meta["folder"] == "/x"


def test_names_that_are_not_utf8(photos: Path, weights: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff od&d\n<b>.png")
    shutil.copy(photos / "c.png", photos / odd)
    os.utime(photos / odd)
    done = cli(photos, "--weights", weights, "--image", photos / odd, "--top", "2", "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert r"\xff od&d" in done.output
    (photos / odd).write_bytes(b"broken now")
    for kind in ("json", "csv"):
        done = cli(photos, "a dog", "--out", tmp_path / f"out.{kind}")
        assert done.exit_code == (1 if kind == "json" else 0), done.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "%FF%20od%26d%0A%3Cb%3E.png" in page
    assert r"\xff od&amp;d" in page
    assert "<b>.png" not in page
