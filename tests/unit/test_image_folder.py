"""Image folders: what is listed, in which order, and that an index never silently misleads."""

import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from openeva.config import ConfigError
from openeva.data import file_index
from openeva.data.file_index import (
    IMAGE_EXTENSIONS,
    ArrayFile,
    FileIndex,
    FileIndexWriter,
    Folder,
    index_path,
    open_or_build,
)
from openeva.data.sources.base import Source
from openeva.data.sources.image_folder import Config, ImageFolder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENEVA_CACHE", str(folder))
    return folder


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def touch_later(folder: Path) -> None:
    """Make sure that a changed folder shows a new time even on a coarse clock."""
    status = folder.stat()
    os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def contents(source: ImageFolder) -> list[str]:
    return [bytes(source.read(i).image).decode() for i in range(len(source))]


def build(*roots: Path, **keys: object) -> ImageFolder:
    return Config(roots=list(roots), **keys).build()


def test_lists_every_depth_and_case_in_sorted_order(tmp_path: Path) -> None:
    put(tmp_path, "b/z.PNG", "b/a.JPeG", "b/deep/er/x.webp", "a/1.tif", "top.pgm", "a/ü 漢字.jpg")
    put(tmp_path, "a/notes.txt", "a/.hidden.jpg", ".git/x.jpg", "a/jpg", "b/._z.png")
    source = build(tmp_path)
    assert contents(source) == ["top.pgm", "a/1.tif", "a/ü 漢字.jpg", "b/a.JPeG", "b/z.PNG", "b/deep/er/x.webp"]
    assert isinstance(source, Source)
    assert source.num_classes == 0
    sample = source.read(2)
    assert (sample.name, sample.label) == (str(tmp_path / "a/ü 漢字.jpg"), -1)
    with pytest.raises(IndexError):
        source.read(6)


def test_accepts_the_official_extensions_and_chosen_ones(tmp_path: Path) -> None:
    put(tmp_path, *(f"x.{e}" for e in IMAGE_EXTENSIONS), "x.gif", "x.heic")
    assert len(build(tmp_path)) == 9
    assert contents(build(tmp_path, extensions=[".GIF"])) == ["x.gif"]


def test_names_that_are_not_utf8_are_read_and_printable(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"coffee")
    sample = build(tmp_path).read(0)
    assert sample.image == b"coffee"
    assert sample.name.encode().endswith(b"caf\\xe9.jpg")


def test_follows_links_as_in_merged30m_and_cuts_loops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "elsewhere", "coco/1.jpg", "coco/2.jpg", "in/n01/3.jpg")
    root = tmp_path / "merged"
    root.mkdir()
    (root / "coco").symlink_to(tmp_path / "elsewhere/coco")
    (root / "21k").symlink_to(tmp_path / "elsewhere/in")
    (root / "again").symlink_to(tmp_path / "elsewhere/coco")
    (tmp_path / "elsewhere/in/n01/up").symlink_to(tmp_path / "elsewhere/in")
    (tmp_path / "elsewhere/coco/home").symlink_to(root)
    (root / "4.jpg").symlink_to(tmp_path / "elsewhere/coco/1.jpg")
    source = build(root)
    names = [str(Path(source.read(i).name).relative_to(root)) for i in range(len(source))]
    # no dedup: two links to one folder count twice, as in the official reader
    assert names == ["4.jpg", "21k/n01/3.jpg", "again/1.jpg", "again/2.jpg", "coco/1.jpg", "coco/2.jpg"]
    assert caplog.text.count("links back to a folder it lies in") == 3


def test_several_roots_are_concatenated_in_the_given_order(tmp_path: Path) -> None:
    put(tmp_path, "z/1.jpg", "a/2.jpg")
    assert contents(build(tmp_path / "z", tmp_path / "a")) == ["z/1.jpg", "a/2.jpg"]
    assert contents(build(tmp_path / "a", tmp_path / "z")) == ["a/2.jpg", "z/1.jpg"]
    assert len(Config(roots=str(tmp_path)).build()) == 2  # type: ignore[arg-type]


def test_labels_are_first_level_folders_over_all_roots(tmp_path: Path) -> None:
    put(tmp_path, "r1/dog/x/1.jpg", "r1/cat/2.jpg", "r2/ant/3.jpg", "r2/dog/4.jpg")
    (tmp_path / "r1/bee").mkdir()  # empty, yet it keeps its number
    for labels in (True, "auto"):
        source = build(tmp_path / "r1", tmp_path / "r2", labels=labels)
        assert source.class_names == ["ant", "bee", "cat", "dog"]
        assert source.num_classes == 4
        assert {bytes(source.read(i).image).decode(): source.read(i).label for i in range(4)} == {
            "r1/cat/2.jpg": 2, "r1/dog/x/1.jpg": 3, "r2/ant/3.jpg": 0, "r2/dog/4.jpg": 3,
        }  # fmt: skip
    source = build(tmp_path / "r2", labels=True, classes=["dog", "cow", "ant"])
    assert (source.num_classes, [source.read(i).label for i in range(2)]) == (3, [2, 0])
    with pytest.raises(ConfigError, match=r"not in `classes`: dog"):
        build(tmp_path / "r2", labels=True, classes=["ant"])


def test_labels_need_every_image_in_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "dog/2.jpg", "loose.jpg")
    with pytest.raises(ConfigError, match=r"loose\.jpg lies right in a root"):
        build(tmp_path, labels=True)
    assert build(tmp_path, labels="auto").num_classes == 0
    only = put(tmp_path / "only", "one/1.jpg")
    assert build(only, labels="auto").num_classes == 0


def test_missing_and_empty_folders_are_named_all_at_once(tmp_path: Path) -> None:
    file = put(tmp_path, "file.jpg") / "file.jpg"
    with pytest.raises(ConfigError) as error:
        build(tmp_path / "nowhere", tmp_path, file)
    assert len(error.value.problems) == 2
    assert f"{tmp_path / 'nowhere'} does not exist" in str(error.value)
    assert "data.train.0.roots=PATH" in str(error.value)
    assert f"{file} is a file" in str(error.value)
    put(tmp_path / "empty", "x.txt")
    with pytest.raises(ConfigError, match=r"no images below .*/empty; files must end in \.jpg"):
        build(tmp_path / "empty")


def test_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "1.jpg")
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "1.jpg" / "no"))
    with pytest.raises(ConfigError, match="OPENEVA_CACHE"):
        build(tmp_path)


def test_second_start_reads_the_index_and_scans_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/1.jpg", "a/2.jpg")
    seen: list[tuple[int, str]] = []
    first = Config(roots=[tmp_path]).build(progress=lambda count, folder: seen.append((count, folder)))
    assert seen == [(0, str(tmp_path)), (2, str(tmp_path / "a"))]
    monkeypatch.setattr(file_index, "scan", lambda *_: pytest.fail("scanned again"))
    second = build(tmp_path)
    assert contents(second) == contents(first)
    assert second.identity == first.identity


def test_changed_folder_is_scanned_again_where_that_is_quick(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a/1.jpg")
    before = build(tmp_path)
    put(tmp_path, "a/2.jpg")
    touch_later(tmp_path / "a")
    after = build(tmp_path)
    assert contents(after) == ["a/1.jpg", "a/2.jpg"]
    assert f"{tmp_path / 'a'} has changed" in caplog.text
    assert before.identity != after.identity
    assert contents(before) == ["a/1.jpg"]  # an open one goes on with its own list


def test_outdated_index_is_warned_about_where_a_scan_is_long_or_unwanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/1.jpg")
    build(tmp_path)
    put(tmp_path, "b/2.jpg")
    touch_later(tmp_path)
    assert contents(build(tmp_path, reindex=False)) == ["a/1.jpg"]
    assert "reindex: true" in caplog.text
    caplog.clear()
    monkeypatch.setattr(file_index, "AUTO_REINDEX_SECONDS", 0.0)
    assert contents(build(tmp_path)) == ["a/1.jpg"]
    assert f"{tmp_path} has changed" in caplog.text
    assert contents(build(tmp_path, reindex=True)) == ["a/1.jpg", "b/2.jpg"]
    caplog.clear()
    assert contents(build(tmp_path)) == ["a/1.jpg", "b/2.jpg"]
    assert not caplog.text


def test_vanished_file_fails_when_it_is_read(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "3.jpg").symlink_to(tmp_path / "gone.jpg")
    source = build(tmp_path)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.jpg"):
        source.read(0)
    with pytest.raises(FileNotFoundError, match=r"3\.jpg"):
        source.read(2)
    assert source.read(1).image == b"2.jpg"


def test_half_written_index_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "1.jpg", "2.jpg")
    build(tmp_path)
    path = index_path([tmp_path], IMAGE_EXTENSIONS)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", bytes(len(whole)), whole[:-1] + b"?"):
        path.write_bytes(damaged)
        caplog.clear()
        assert contents(build(tmp_path)) == ["1.jpg", "2.jpg"]
        assert "cannot use the index" in caplog.text


def test_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with FileIndexWriter(tmp_path / "x.idx") as writer:
        writer.add(Folder(b"/a", [b"1.jpg"]))  # and no commit, as after an exception
    assert list(tmp_path.iterdir()) == []


def test_unreadable_folder_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/1.jpg", "locked/2.jpg")
    real = file_index._list_folder

    def refuse(folder: bytes, wanted: frozenset[bytes]) -> tuple[list[bytes], list[bytes]]:
        if folder.endswith(b"locked"):  # root, who may run this test, is refused nothing
            raise PermissionError(13, "Permission denied", folder)
        return real(folder, wanted)

    monkeypatch.setattr(file_index, "_list_folder", refuse)
    assert contents(build(tmp_path)) == ["a/1.jpg"]
    assert "locked: Permission denied" in caplog.text


def test_every_name_is_found_across_blocks_and_empty_folders(tmp_path: Path) -> None:
    folders = [Folder(f"/r/{d}".encode(), [f"{d}_{i}.jpg".encode() for i in range(n)], b"g%d" % (d % 3))
               for d, n in enumerate([0, 1, 31, 0, 32, 33, 0, 0, 100, 1, 0])]  # fmt: skip
    with FileIndexWriter(tmp_path / "x.idx") as writer:
        for folder in folders:
            writer.add(folder)
        writer.commit(seconds=0)
    index = FileIndex(tmp_path / "x.idx")
    expected = [(f.path + b"/" + name, f.group) for f in folders for name in f.names]
    assert len(index) == len(expected) == 198
    actual = [(index.path_of(i), index.groups[index.group_of(i)].encode()) for i in range(len(index))]
    assert actual == expected


def _first_bytes(source: ImageFolder, queue: "multiprocessing.Queue[list[str]]") -> None:
    queue.put(contents(source))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_map_the_same_index(tmp_path: Path, method: str) -> None:
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    source = build(tmp_path, labels=True)
    assert len(pickle.dumps(source)) < 2000  # the path, not the list
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_first_bytes, args=(source, queue))
    worker.start()
    assert queue.get(timeout=60) == ["a/1.jpg", "b/2.jpg"]
    worker.join()


def test_worker_refuses_an_index_that_was_rebuilt_meanwhile(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    pickled = pickle.dumps(build(tmp_path))
    put(tmp_path, "0.jpg")
    build(tmp_path, reindex=True)
    with pytest.raises(RuntimeError, match="was rebuilt"):
        pickle.loads(pickled)


def _scan_slowly(root: Path, queue: "multiprocessing.Queue[int]") -> None:
    scans = 0

    def count(num_files: int, folder: str) -> None:
        nonlocal scans
        scans += 1

    index = open_or_build([root], IMAGE_EXTENSIONS, reindex=True, progress=count)
    queue.put(scans * 100 + len(index))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_of_several_processes_one_scans(tmp_path: Path, cache: Path) -> None:
    put(tmp_path, "1.jpg", "2.jpg")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with file_index.locked(
        index_path([tmp_path], IMAGE_EXTENSIONS)
    ):  # all of them have asked before the first may scan
        workers = [context.Process(target=_scan_slowly, args=(tmp_path, queue)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(0.3)
    assert sorted(queue.get(timeout=30) for _ in workers) == [2, 2, 102]
    for worker in workers:
        worker.join()
    assert not list(cache.rglob("*.tmp"))


def test_index_costs_little_more_than_the_names(tmp_path: Path) -> None:
    names = [f"{i:09d}.jpg".encode() for i in range(20_000)]
    with FileIndexWriter(tmp_path / "x.idx") as writer:
        writer.add(Folder(b"/a/long/folder/path/that/is/stored/once", names))
        writer.commit(seconds=0)
    assert (tmp_path / "x.idx").stat().st_size / 20_000 < 14 + 0.5
    assert isinstance(ArrayFile(tmp_path / "x.idx").meta["created"], float)
    assert logging.getLogger("openeva").level == logging.NOTSET  # the library leaves logging to the user
