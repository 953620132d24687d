"""Tar shards: what a sample is, exact random access, and plain words about shards that are cut, damaged or gone."""

import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from openeva.config import ConfigError, validate
from openeva.data.loader import DataConfig, TrainLoader
from openeva.data.sources.base import Source, StreamSource
from openeva.data.sources.webdataset import MAX_OPEN_SHARDS, Config, WebDataset, WebDatasetStream
from openeva.data.tar_index import INDEX_SUFFIX
from openeva.data.views import CropConfig, ViewSpec
from openeva.text.tokenizer import Tokenizer

TEXT = ViewSpec((8, 8), tokenizer=Tokenizer())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENEVA_CACHE", str(folder))
    return folder


def write(path: Path, *samples: dict[str, object]) -> Path:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def numbered(first: int, count: int) -> list[dict[str, object]]:
    return [
        {
            "__key__": f"{i:09d}",
            "jpg": b"image %d" % i + bytes(i * 37 % 1500),
            "txt": f"caption ü {i}".encode(),
            "json": json.dumps({"number": i}).encode(),
            "cls": str(i % 5).encode(),
        }
        for i in range(first, first + count)
    ]


def archive(path: Path, files: list[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def build(*shards: Path | str, **keys: object) -> WebDataset:
    source = Config(shards=[str(s) for s in shards], **keys).build()
    assert isinstance(source, WebDataset)
    return source


def number(sample: object) -> int:
    return int(bytes(sample.image).rstrip(b"\0").split()[1])  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------- local shards


def test_reads_what_the_library_writes_in_any_order(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.tar", *numbered(0, 40)), write(tmp_path / "b.tar", *numbered(40, 3))
    source = build(a, b, num_classes=5, extra_keys="txt;json")
    assert isinstance(source, Source)
    assert not isinstance(source, StreamSource)
    assert len(source) == 43
    expected = numbered(0, 43)
    for i in [42, 0, 39, 40, 17, *range(43)]:
        sample = source.read(i)
        assert sample.image == expected[i]["jpg"]
        assert sample.extra == {
            "txt": f"caption ü {i}",
            "json": {"number": i},
            "captions": [f"caption ü {i}"],
        }
        assert sample.label == i % 5
        assert sample.name == f"{a if i < 40 else b}:{i:09d}"
    for i in (-1, 43):
        with pytest.raises(IndexError):
            source.read(i)


def test_samples_are_those_of_the_library(tmp_path: Path) -> None:
    files = [
        ("__meta__", b"{}"), ("top.JPG", b"1"), ("top.Txt", b"t"), ("dir.v2/one.jpg", b"2"),
        ("dir.v2/one.seg.png", b"s"), ("dir.v2/one.json", b"{}"), ("noext", b"n"), ("ü/漢字.jpg", b"3"),
        ("a/" + "long/" * 40 + "x" * 120 + ".jpg", b"4"), ("top.jpg", b"5"), ("empty.jpg", b""),
        ("__x__/skip.jpg", b"k"),
    ]  # fmt: skip
    for name, kind in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        path = archive(tmp_path / f"{name}.tar", files, kind)
        with tarfile.open(path, "a", format=kind) as tar:
            folder = tarfile.TarInfo("folder.jpg")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        with path.open("rb") as file:
            unpacked = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            reference = list(webdataset.tariterators.group_by_keys(unpacked))
        source = build(path, extra_keys="seg.png")
        assert [source.read(i).name for i in range(len(source))] == [f"{path}:{r['__key__']}" for r in reference]
        assert [source.read(i).image for i in range(len(source))] == [r["jpg"] for r in reference] != []
        assert source.read(1).extra == {"seg.png": b"s"}


def test_shard_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        write(tmp_path / f"{i:06d}.tar", *numbered(i, 1))
    monkeypatch.chdir(tmp_path)
    for pattern, expected in [
        ("{000001..000003}.tar", [1, 2, 3]),
        (f"{tmp_path}/*.tar", [0, 1, 2, 3]),
        (f"file:{tmp_path}/000002.tar", [2]),
        ("*", [0, 1, 2, 3]),  # the indexes beside the shards are no shards
        ("{000003,000000}.tar", [3, 0]),
    ]:
        source = build(pattern)
        assert [number(source.read(i)) for i in range(len(source))] == expected, pattern
    assert len(Config(shards="000000.tar").build()) == 1  # type: ignore[arg-type]


def test_problems_with_shards_come_all_at_once(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", *numbered(0, 1))
    with pytest.raises(ConfigError) as error:
        build(tmp_path / "{0..2}.tar", tmp_path, tmp_path / "x*.tar", "ftp://host/x.tar", "${NOT_SET_ANYWHERE}.tar")
    text = str(error.value)
    assert len(error.value.problems) == 6
    for part in ("1.tar", "2.tar", f"{tmp_path}/*.tar", "x*.tar", "cannot open ftp:", "WDS_NOT_SET_ANYWHERE"):
        assert part in text

    write(tmp_path / "good.tar", *numbered(0, 1))
    (tmp_path / "bad.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes()))
    archive(tmp_path / "twice.tar", [("a.jpg", b"1"), ("a.JPG", b"2")])
    with pytest.raises(ConfigError) as error:
        build(*(tmp_path / f"{name}.tar" for name in ("good", "bad", "zero", "z", "twice")))
    assert len(error.value.problems) == 4
    for part in (
        "bad.tar is not a tar",
        "zero.tar is not a tar",
        "z.tar is compressed (gzip)",
        "stream: true",
        "twice",
    ):
        assert part in str(error.value)


def test_missing_image_key_names_those_that_are_there(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("a.heic", b"1"), ("b.photo.jpg", b"2"), ("b.txt", b"t")])
    with pytest.raises(ConfigError, match=r"heic, photo\.jpg, txt; name those of the images in `image_keys`"):
        build(path)
    source = build(path, image_keys="PHOTO.jpg; png")
    with pytest.raises(OSError, match="no image among its keys heic") as error:
        source.read(0)
    assert error.value.filename == f"{path}:a"
    assert source.read(1).image == b"2"
    assert build(path, image_keys=["heic", "photo.jpg"]).read(0).image == b"1"


@pytest.mark.parametrize("label", [b"5", b"-1", b"cat", None])
def test_bad_label_is_an_error_and_not_a_class(tmp_path: Path, label: bytes | None) -> None:
    path = archive(tmp_path / "a.tar", [("a.jpg", b"1")] + ([("a.cls", label)] if label else []))
    assert build(path).read(0).label == -1
    with pytest.raises(ValueError, match=r"a\.tar:a has label .* num_classes=5"):
        build(path, num_classes=5).read(0)


def test_unreadable_json_is_a_broken_sample(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", b"{")])
    with pytest.raises(OSError, match="its json is not readable"):
        build(path, extra_keys="json").read(0)
    assert build(path).read(0).extra is None


def test_index_is_written_once_beside_the_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *numbered(0, 5))
    seen: list[tuple[int, str]] = []
    Config(shards=[str(path)]).build(progress=lambda count, shard: seen.append((count, shard)))
    assert seen == [(5, str(path))]
    index = path.with_name(path.name + INDEX_SUFFIX)
    before = index.stat()
    Config(shards=[str(path)]).build(progress=lambda count, shard: pytest.fail("scanned again"))
    assert index.stat() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.openeva.idx"]


def test_read_only_folder_keeps_its_indexes_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tar", *numbered(0, 5))
    real = Path.open

    def refuse(self: Path, mode: str = "r", **keys: object) -> object:
        if "x" in mode and self.parent == tmp_path:  # root, who may run this test, is refused nothing
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, mode, **keys)

    monkeypatch.setattr(Path, "open", refuse)
    assert number(build(path).read(3)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    assert len(list((cache / "shards").iterdir())) == 1
    Config(shards=[str(path)]).build(progress=lambda count, shard: pytest.fail("scanned again"))


def test_replaced_shard_is_scanned_again_and_refused_by_a_running_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *numbered(0, 5))
    old = build(path)
    write(path, *numbered(100, 7))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))
    with pytest.raises(OSError, match="changed after the run had started"):
        old.read(0)
    new = build(path)
    assert [number(new.read(i)) for i in range(len(new))] == list(range(100, 107))
    assert new.identity != old.identity
    with pytest.raises(OSError, match="changed after the run had started"):
        old.read(0)  # its offsets are not those of the new index


def test_damaged_index_is_written_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *numbered(0, 5))
    build(path)
    index = path.with_name(path.name + INDEX_SUFFIX)
    index.write_bytes(index.read_bytes()[:-3])
    assert number(build(path).read(4)) == 4


def test_cut_shard_gives_the_samples_before_the_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [(f"{i}.{kind}", b"image %d" % i + bytes(600)) for i in range(4) for kind in ("jpg", "txt")]
    whole = archive(tmp_path / "whole.tar", files).read_bytes()
    step = 512 + 1024 + 512 + 1024  # two files of a sample: header and two blocks each
    build(tmp_path / "whole.tar")
    assert not caplog.text
    for end, usable, reason in [
        (2 * step + 100, 2, "damaged or cut at byte"),  # in a header
        (2 * step + 512 + 300, 2, "cut at byte"),  # in an image
        (2 * step + 1536 + 512 + 10, 2, "cut at byte"),  # in a caption: the image before it is dropped with it
        (3 * step, 3, "has no end mark"),
        (4 * step, 4, "has no end mark"),
    ]:
        path = tmp_path / f"{end}.tar"
        path.write_bytes(whole[:end])
        caplog.clear()
        source = build(path)
        assert [number(source.read(i)) for i in range(len(source))] == list(range(usable)), end
        assert str(path) in caplog.text
        assert reason in caplog.text
        assert f"the {usable} samples before are used" in caplog.text
    garbage = bytearray(whole)
    garbage[2 * step : 2 * step + 512] = b"x" * 512
    path.write_bytes(garbage)
    caplog.clear()
    assert len(build(path)) == 2
    assert f"damaged or cut at byte {2 * step}" in caplog.text


def test_shard_that_vanishes_is_broken_at_read_time(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.tar", *numbered(0, 2)), write(tmp_path / "b.tar", *numbered(2, 2))
    source = build(a, b)
    a.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        source.read(0)
    assert number(source.read(2)) == 2


def test_open_files_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", *numbered(0, 1))
    shards = [path, *(tmp_path / f"{i}.tar" for i in range(1, MAX_OPEN_SHARDS + 40))]
    for shard in shards[1:]:
        shutil.copy(path, shard)
    source = build(*shards)
    for i in range(len(source)):
        source.read(i)
    num_open = sum(str(tmp_path) in str(fd.resolve()) for fd in Path("/proc/self/fd").iterdir())
    assert MAX_OPEN_SHARDS // 2 < num_open <= 2 * MAX_OPEN_SHARDS


def _numbers(source: WebDataset, queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put([number(source.read(i)) for i in range(len(source))])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_read_the_same_samples_at_once(tmp_path: Path) -> None:
    source = build(write(tmp_path / "a.tar", *numbered(0, 300)))
    source.read(0)  # opened before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_numbers, args=(source, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [list(range(300))] * 2
    for worker in workers:
        worker.join()
    pickled = pickle.dumps(source)
    assert len(pickled) < 3000
    assert number(pickle.loads(pickled).read(299)) == 299


# ------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("files", "keys", "captions"),
    [
        ({"txt": b" a cat\n"}, {}, [" a cat\n"]),
        ({"caption": b"a dog"}, {}, ["a dog"]),
        ({"json": b'{"width": 3, "caption": "a cow"}', "txt": b"a cat"}, {}, ["a cat"]),
        ({"json": b'{"width": 3, "caption": "a cow"}', "txt": b"a cat"}, {"caption_key": "json"}, ["a cow"]),
        ({"json": b'{"alt": "a sow", "caption": "a cow"}'}, {"caption_field": "alt"}, ["a sow"]),
        ({"json": b'["a cow", "an ox"]'}, {}, ["a cow", "an ox"]),
        ({"json": b'{"captions": ["a cow", {"raw": "an ox"}, ""]}'}, {}, ["a cow", "an ox"]),
        ({"alt.txt": b"a hen", "txt": b"a cat"}, {"caption_key": "alt.txt;txt"}, ["a hen"]),
        ({"txt": b"a cat\n\n a pet \n"}, {"caption_lines": True}, ["a cat", " a pet "]),
        ({"txt": b"a cat"}, {"caption_key": None}, None),
        ({"txt": b"\xff\xfe"}, {}, None),
        ({"json": b"{"}, {}, None),
        ({"json": b"[1, 2]"}, {"caption_field": "alt"}, None),
        ({"json": b'{"width": 3}'}, {}, None),
        ({"txt": b" \n"}, {}, None),
        ({}, {}, None),
    ],
)
def test_captions(
    tmp_path: Path, stream: bool, files: dict[str, bytes], keys: dict[str, object], captions: list[str] | None
) -> None:
    path = write(tmp_path / "a.tar", {"__key__": "0", "webp": b"image 0", **files})
    if stream:
        source = Config(shards=[str(path)], stream=True, samples_per_epoch=1, **keys).build()
        sample = next(source.stream(epoch=0, seed=0, part=0, num_parts=1))
    else:
        sample = build(path, **keys).read(0)
    assert sample.image == b"image 0"
    assert sample.extra == (None if captions is None else {"captions": captions})


def test_source_says_whether_it_has_captions(tmp_path: Path) -> None:
    with_text = write(tmp_path / "a.tar", *numbered(0, 2))
    without = write(tmp_path / "b.tar", {"__key__": "0", "jpg": b"image 0"})
    assert build(with_text).has_captions
    assert build(with_text, without).has_captions
    assert not build(without).has_captions
    assert not build(with_text, caption_key=None).has_captions
    assert stream_of(tmp_path).has_captions
    assert not stream_of(tmp_path, caption_key=None).has_captions


def test_several_roots_in_one_string(tmp_path: Path) -> None:
    for name in ("a0", "a1", "b0"):
        write(tmp_path / f"{name}.tar", *numbered(int(name[1]), 1))
    source = Config(shards=f"{tmp_path}/a{{0..1}}.tar; {tmp_path}/b*.tar;").build()  # type: ignore[arg-type]
    assert [Path(source.read(i).name).name for i in range(len(source))] == [
        "a0.tar:000000000", "a1.tar:000000001", "b0.tar:000000000",
    ]  # fmt: skip
    command = Config(shards="pipe:true; cat x.tar", samples_per_epoch=1).build()  # type: ignore[arg-type]
    assert command._urls == ["pipe:true; cat x.tar"]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def image_text_shard(path: Path, numbers: range, broken: dict[int, dict[str, bytes]] | None = None) -> Path:
    samples = [{"png": png(i), "txt": b"number %d" % i, **(broken or {}).get(i, {})} for i in numbers]
    return write(path, *({"__key__": f"{i:04d}", **sample} for i, sample in zip(numbers, samples, strict=True)))


@pytest.mark.parametrize("stream", [False, True])
def test_pairs_that_are_broken_in_any_way_are_left_out_and_named(tmp_path: Path, stream: bool) -> None:
    broken = {3: {"txt": b""}, 4: {"png": b"no image"}, 5: {"txt": b"\xff\xff"}}
    path = image_text_shard(tmp_path / "a.tar", range(30), broken)
    train = {"name": "webdataset", "shards": str(path), "stream": stream, "samples_per_epoch": 30}
    data, _ = validate(DataConfig, {"train": [train]}).open()
    loader = TrainLoader(data, TEXT, CropConfig(kind="center", hflip=0), batch_size=5, max_broken=0.5)
    batches = list(itertools.islice(loader.batches(), 6))
    assert set(loader.broken) == {f"{path}:{i:04d}" for i in broken}
    for (batch,) in batches:
        shown = batch["image"][:, 0, 0, 0].tolist()
        assert not set(shown) & set(broken)
        assert torch.equal(batch["text"], TEXT.tokenizer([f"number {i}" for i in shown]))


# ------------------------------------------------------------------------------------------------- mixtures


def shares(train: list[dict[str, object]], epochs: int = 4) -> tuple[int, float]:
    """Samples per epoch, and how many of them are numbered below 100, over some epochs."""
    data, _ = validate(DataConfig, {"train": train}).open()
    loader = TrainLoader(data, ViewSpec((8, 8)), CropConfig(kind="center", hflip=0), batch_size=10)
    steps = itertools.islice(loader.batches(), epochs * loader.steps_per_epoch)
    shown = [i for (batch,) in steps for i in batch["image"][:, 0, 0, 0].tolist()]
    assert len(shown) == epochs * loader.samples_per_epoch
    return loader.samples_per_epoch, sum(i < 100 for i in shown) / len(shown)


@pytest.mark.parametrize("stream", [False, True])
def test_sources_come_in_proportion_to_their_samples_and_weights(tmp_path: Path, stream: bool) -> None:
    large = {"name": "webdataset", "shards": str(image_text_shard(tmp_path / "a.tar", range(80)))}
    small = {"name": "webdataset", "shards": str(image_text_shard(tmp_path / "b.tar", range(200, 220)))}

    def mixed(**keys: float) -> list[dict[str, object]]:
        lengths = [{"stream": True, "samples_per_epoch": n} for n in (80, 20)] if stream else [{}, {}]
        return [{**large, **lengths[0]}, {**small, **lengths[1], **keys}]

    tolerance = 0.07 if stream else 0  # numbered samples are dealt, those of streams are drawn
    for keys, length, share in [({}, 100, 0.8), ({"weight": 4}, 160, 0.5), ({"weight": 0.5}, 90, 8 / 9)]:
        samples, large_share = shares(mixed(**keys))
        assert samples == length
        assert large_share == pytest.approx(share, abs=tolerance)


def test_epoch_of_a_given_length_is_a_share_of_the_data_and_the_next_goes_on(tmp_path: Path) -> None:
    paths = image_text_shard(tmp_path / "a.tar", range(80)), image_text_shard(tmp_path / "b.tar", range(200, 220))
    train = [
        {"name": "webdataset", "shards": str(path), "samples_per_epoch": n}
        for path, n in zip(paths, (16, 4), strict=True)
    ]
    assert shares(train) == (20, 0.8)
    data, _ = validate(DataConfig, {"train": train}).open()
    loader = TrainLoader(data, ViewSpec((8, 8)), CropConfig(kind="center", hflip=0), batch_size=20)
    seen = [i for (batch,) in itertools.islice(loader.batches(), 5) for i in batch["index"].tolist()]
    assert sorted(seen) == list(range(100))  # five epochs of a fifth are all of it


# ------------------------------------------------------------------------------------------------- pipes and URLs


def stream_of(tmp_path: Path, num_shards: int = 6, per_shard: int = 10, **keys: object) -> WebDatasetStream:
    for i in range(num_shards):
        write(tmp_path / f"{i:03d}.tar", *numbered(i * per_shard, per_shard))
    keys = {"samples_per_epoch": num_shards * per_shard, "shuffle_buffer": 8, **keys}
    source = Config(shards=[f"pipe:cat {tmp_path}/{{000..{num_shards - 1:03d}}}.tar"], **keys).build()
    assert isinstance(source, WebDatasetStream)
    return source


def numbers(source: WebDatasetStream, epoch: int = 0, seed: int = 0, part: int = 0, num_parts: int = 1) -> list[int]:
    return [number(s) for s in source.stream(epoch=epoch, seed=seed, part=part, num_parts=num_parts)]


def test_stream_gives_every_sample_once_over_all_readers(tmp_path: Path) -> None:
    source = stream_of(tmp_path, num_classes=5, extra_keys="json")
    assert isinstance(source, StreamSource)
    assert not isinstance(source, Source)
    for num_parts in (1, 2, 3, 6):
        parts = [numbers(source, part=p, num_parts=num_parts) for p in range(num_parts)]
        assert sorted(itertools.chain(*parts)) == list(range(60))
        assert {len(p) for p in parts} == {60 // num_parts}
    sample = next(source.stream(epoch=0, seed=0, part=0, num_parts=1))
    i = number(sample)
    assert (sample.label, sample.extra) == (i % 5, {"json": {"number": i}, "captions": [f"caption ü {i}"]})
    assert sample.name == f"pipe:cat {tmp_path}/{i // 10:03d}.tar:{i:09d}"


def test_stream_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    source = stream_of(tmp_path)
    first = numbers(source)
    assert numbers(source) == first
    assert numbers(source, epoch=1) != first
    assert numbers(source, seed=1) != first
    unmixed = stream_of(tmp_path, shuffle_buffer=1)
    shards = [tuple(dict.fromkeys(i // 10 for i in numbers(unmixed, epoch=e, seed=s))) for e in (0, 1) for s in (0, 1)]
    assert all(sorted(order) == list(range(6)) for order in shards)
    assert len(set(shards)) == 4  # not only the samples in the buffer
    assert any(a > b for a, b in itertools.pairwise(first) if a // 10 == b // 10)  # within a shard too


def test_more_readers_than_shards_share_them_evenly(tmp_path: Path) -> None:
    source = stream_of(tmp_path, num_shards=2, per_shard=12)
    parts = [numbers(source, part=p, num_parts=6) for p in range(6)]
    assert sorted(itertools.chain(*parts)) == list(range(24))
    assert [len(p) for p in parts] == [4] * 6
    tiny = stream_of(tmp_path, num_shards=1, per_shard=2, samples_per_epoch=8)
    assert [len(numbers(tiny, part=p, num_parts=4)) for p in range(4)] == [2, 2, 0, 0]


def test_epoch_longer_or_shorter_than_the_data(tmp_path: Path) -> None:
    longer = numbers(stream_of(tmp_path, num_shards=2, samples_per_epoch=50))
    assert len(longer) == 50
    assert {longer.count(i) for i in range(20)} <= {2, 3}
    assert len(numbers(stream_of(tmp_path, num_shards=2, samples_per_epoch=5))) == 5


def test_shard_that_breaks_off_is_left_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = stream_of(tmp_path, num_shards=3, samples_per_epoch=25)
    (tmp_path / "001.tar").unlink()
    whole = (tmp_path / "002.tar").read_bytes()
    (tmp_path / "002.tar").write_bytes(whole[: len(whole) // 2])
    given = set(numbers(source))
    assert given >= set(range(10)) | {20, 21}
    assert not given & {*range(10, 20), 29}
    assert "001.tar" in caplog.text
    assert "002.tar" in caplog.text


def test_stream_without_any_sample_says_why(tmp_path: Path) -> None:
    source = stream_of(tmp_path, num_shards=1)
    (tmp_path / "000.tar").unlink()
    with pytest.raises(ValueError, match=r"no sample with an image in pipe:cat .*000\.tar; .*check the URLs"):
        numbers(source)
    no_images = stream_of(tmp_path, num_shards=1, image_keys=["png"])
    with pytest.raises(ValueError, match=r"no image among its keys .*jpg"):
        numbers(no_images)


def test_stream_needs_a_length_and_no_local_shards_beside_it(tmp_path: Path) -> None:
    stream_of(tmp_path, num_shards=1)
    with pytest.raises(ConfigError, match="samples_per_epoch is required"):
        Config(shards=["https://host/{0..9}.tar"]).build()
    with pytest.raises(ConfigError, match="local shards and URLs in one source"):
        Config(shards=["https://host/0.tar", str(tmp_path / "000.tar")], samples_per_epoch=9).build()


def test_s3_goes_through_the_aws_command() -> None:
    source = Config(shards=["s3://bucket/a b/{0..1}.tar"], samples_per_epoch=9).build()
    assert source._urls == [f"pipe:aws s3 cp 's3://bucket/a b/{i}.tar' -" for i in range(2)]


def test_compressed_local_shards_can_be_streamed(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.tar", *numbered(0, 10)).read_bytes()
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(plain))
    source = Config(shards=[str(packed)], stream=True, samples_per_epoch=10).build()
    assert sorted(numbers(source)) == list(range(10))
