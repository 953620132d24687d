"""The `huggingface` source: data sets of the `datasets` library, saved here (nothing is downloaded)."""

import gc
import io
import pickle
import sys
from itertools import islice

import pytest
import torch
from PIL import Image

from openeva.config import ConfigError, validate
from openeva.data.decode import decode
from openeva.data.labels import class_counts, has_captions
from openeva.data.loader import DataConfig, TrainLoader
from openeva.data.sources.base import Source
from openeva.data.sources.huggingface import Config
from openeva.data.views import CropConfig, ViewSpec
from openeva.text.tokenizer import Tokenizer

datasets = pytest.importorskip("datasets")
KINDS = ["cat", "dog", "owl"]


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


FEATURES = {
    "image": datasets.Image(),
    "caption": datasets.List(datasets.Value("string")),
    "kind": datasets.ClassLabel(names=KINDS),
    "id": datasets.Value("int64"),
}


def table(count=6):
    columns = {
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "caption": [[f"picture {i}", f"number {i}"] for i in range(count)],
        "kind": [i % 3 for i in range(count)],
        "id": list(range(count)),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(FEATURES))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def saved(tmp_path):
    """Saves data and opens it."""

    def save_and_open(data, **keys):
        folder = tmp_path / "saved"
        data.save_to_disk(folder)
        return Config(dataset=str(folder), **keys).build()

    return save_and_open


def read_all(source):
    samples = [source.read(i) for i in range(len(source))]
    return [(int(decode(s.image)[0, 0, 0]), s.extra, s.label) for s in samples]


EXPECTED = [(i, {"captions": [f"picture {i}", f"number {i}"]}, i % 3) for i in range(6)]


def test_images_captions_and_labels_are_found(saved):
    source = saved(table())
    assert isinstance(source, Source)
    assert read_all(source) == EXPECTED
    assert source.read(0).image == png(0)  # still encoded
    assert source.class_names == KINDS
    assert source.labels().tolist() == [0, 1, 2, 0, 1, 2]
    assert class_counts(source).tolist() == [2, 2, 2]
    assert has_captions(source)
    assert source.name_of(4) == source.read(4).name
    assert source.name_of(4).endswith("saved/train:4")
    worker = pickle.loads(pickle.dumps(source))
    assert read_all(worker) == EXPECTED
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source.read(index)


def test_splits_and_columns_by_name(saved):
    both = datasets.DatasetDict({"train": table(), "test": table(3).rename_column("caption", "words")})
    source = saved(both, split="test", caption_column="words", label_column="id")
    assert [(extra, label) for _, extra, label in read_all(source)] == [(EXPECTED[i][1], i) for i in range(3)]
    assert source.class_names == ["0", "1", "2"]


def test_captions_of_several_columns(saved):
    data = table(2).add_column("title", ["the first", "the second"])
    source = saved(data, caption_column=["title", "caption"])
    assert [extra["captions"] for _, extra, _ in read_all(source)] == [
        ["the first", "picture 0", "number 0"],
        ["the second", "picture 1", "number 1"],
    ]


def test_source_without_captions_and_labels(saved):
    source = saved(table().select_columns(["image"]))
    assert [(extra, label) for _, extra, label in read_all(source)] == [(None, -1)] * 6
    assert (source.num_classes, has_captions(source), source.labels().tolist()) == (0, False, [-1] * 6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its file open
def test_folder_of_images_with_metadata(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    rows = "".join(f"{n}.png,picture {n}\n" for n in range(3))
    (folder / "metadata.csv").write_text(f"file_name,text\n{rows}")
    source = Config(dataset=str(folder)).build()
    gc.collect()
    assert [(value, extra) for value, extra, _ in read_all(source)] == [
        (n, {"captions": [f"picture {n}"]}) for n in range(3)
    ]


def test_folder_of_parquet_files_and_parts_of_a_split_without_progress_bars(tmp_path, capfd):
    (tmp_path / "parquet").mkdir()
    table().to_parquet(tmp_path / "parquet" / "train.parquet")
    capfd.readouterr()
    source = Config(dataset=str(tmp_path / "parquet"), split="train[2:4]").build()
    assert read_all(source) == EXPECTED[2:4]
    assert capfd.readouterr().err == ""
    assert datasets.is_progress_bar_enabled()


def test_identity_tells_samples_and_columns_apart(saved):
    first = saved(table(), caption_column="caption").identity
    assert saved(table(), caption_column="caption").identity == first
    assert saved(table(5), caption_column="caption").identity != first
    assert saved(table(), caption_column=[]).identity != first


def test_row_without_image_is_broken(saved):
    empty = table().map(lambda row: {"image": None if row["id"] == 2 else row["image"]}, features=table().features)
    source = saved(empty)
    with pytest.raises(OSError, match="no image in this row"):
        source.read(2)
    assert source.read(3).image == png(3)


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (None, {"split": "tset"}, "has no split 'tset'; did you mean 'test'"),
        (None, {"caption_column": "captoin"}, r"no column 'captoin' \(caption_column\); did you mean 'caption'"),
        (None, {"image_column": "id"}, "'id' holds number, no images; cast it to `Image`; the columns are image"),
        (None, {"label_column": "caption"}, "column 'caption' holds text, no classes; cast it"),
        ("no image", {}, r"holds the images\? By its type, none does; set image_column; the columns are id"),
        ("two images", {}, "By its type, image, depth do"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_data_set(saved, change, keys, message):
    data = table()
    if change == "no image":
        data = data.select_columns(["id"])
    elif change == "two images":
        data = data.add_column("depth", [{"bytes": png(0), "path": None}] * 6, feature=datasets.Image())
    with pytest.raises(ConfigError, match=message):
        saved(datasets.DatasetDict({"train": data, "test": data}), **keys)


def test_data_set_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"cannot load '.*empty' \(split train\): .*"):
        Config(dataset=str(tmp_path / "empty")).build()

    def no_such_name(*args, **keys):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", no_such_name)
    with pytest.raises(ConfigError, match=r"exist on the Hub; it is a name on the hub, or the path of a folder that e"):
        Config(dataset="nobody/nothing").build()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'openeva\[hf\]'"):
        Config(dataset="nlphuji/flickr30k").build()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_read_the_same_batches(saved, tmp_path):
    saved(table(8))
    config = validate(DataConfig, {"train": [{"name": "huggingface", "dataset": str(tmp_path / "saved")}]})
    spec = ViewSpec((8, 8), tokenizer=Tokenizer())

    def batches(num_workers):
        loader = TrainLoader(config.open()[0], spec, CropConfig(), batch_size=4, num_workers=num_workers).batches()
        taken = [batch for (batch,) in islice(loader, 4)]
        loader.close()
        return taken

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one["index"].tolist() == one["image"][:, 0, 0, 0].tolist()
        assert torch.equal(one["text"], other["text"])
        assert torch.equal(one["image"], other["image"])
