"""The `captions` source: all kinds of files that list images with captions, and what is wrong with them."""

import json
import logging
import os
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from openeva.config import ConfigError
from openeva.data.caption_index import CaptionRows
from openeva.data.labels import has_captions
from openeva.data.loader import DataConfig, TrainLoader
from openeva.data.sources.captions import Config
from openeva.data.views import CropConfig, ViewSpec
from openeva.text.tokenizer import Tokenizer

PATHS = ["a.png", "b/two words.png", "b/c.jpg"]
EXPECTED = {"a.png": ["a red ball"], "b/two words.png": ["a cat, on a mat"], "b/c.jpg": ["ein Hühnerei; ganz"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    for number, path in enumerate(PATHS):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / path, "PNG")
    return tmp_path


@pytest.fixture
def opened(folder):
    """Writes a file beside the images and opens it."""

    def write_and_open(content, name="pairs.csv", **keys):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return Config(file=folder / name, **keys).build()

    return write_and_open


def pairs(source, root):
    samples = [source.read(i) for i in range(len(source))]
    assert [source.name_of(i) for i in range(len(source))] == [sample.name for sample in samples]
    assert all(sample.image == Path(sample.name).read_bytes() for sample in samples)
    return [(str(Path(sample.name).relative_to(root)), sample.extra["captions"]) for sample in samples]


def as_table(delimiter, names):
    quoted = [f'"{text}"' if delimiter in text else text for _, (text,) in EXPECTED.items()]
    rows = [delimiter.join(pair) for pair in zip(EXPECTED, quoted, strict=True)]
    return "\n".join([delimiter.join(names), *rows] if names else rows) + "\n"


# ------------------------------------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("names", [[], ["filepath", "title"], ["Image", "Caption"], ["path", "text"]])
def test_tables_with_and_without_names(opened, folder, delimiter, names):
    source = opened("\ufeff" + as_table(delimiter, names))
    assert pairs(source, folder) == list(EXPECTED.items())
    assert source.num_classes == 0
    assert has_captions(source)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.ndjson", "pairs.txt"])
def test_json_lines(opened, folder, name):
    lines = [
        {"id": n, "image": path, "text": texts[0] if n else texts} for n, (path, texts) in enumerate(EXPECTED.items())
    ]
    assert pairs(opened("\n".join(map(json.dumps, lines)) + "\n", name), folder) == list(EXPECTED.items())


def test_json_list(opened, folder):
    entries = [{"image_id": n, "image": path, "caption": texts} for n, (path, texts) in enumerate(EXPECTED.items())]
    assert pairs(opened(entries, "coco_karpathy_val.json"), folder) == list(EXPECTED.items())


def test_coco_captions(opened, folder):
    content = {
        "images": [{"id": 7, "file_name": "c.jpg"}, {"id": 3, "file_name": "two words.png"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "a cat\n"},
            {"id": 2, "image_id": 7, "caption": "an egg"},
            {"id": 3, "image_id": 3, "caption": "a mat"},
        ],
    }
    source = opened(content, "captions_val2014.json", root=folder / "b")
    assert pairs(source, folder) == [("b/c.jpg", ["an egg"]), ("b/two words.png", ["a cat\n", "a mat"])]


def karpathy():
    def image(split, filename, *texts, **more):
        return {
            "split": split,
            "filename": filename,
            "sentences": [{"raw": t, "tokens": t.split()} for t in texts],
        } | more

    return {
        "dataset": "coco",
        "images": [
            image("train", "a.png", "one", "two"),
            image("restval", "two words.png", "three", filepath="b"),
            image("test", "c.jpg", "four", filepath="b"),
        ],
    }


def test_other_settings_of_the_same_file_have_an_index_of_their_own(folder):
    """Else a run would be tested on the split that it was trained on."""
    text = "image,caption,other,split,part\na.png,x,y,train,1\nb/c.jpg,z,w,val,1\na.png,v,u,val,2\n"
    (folder / "pairs.csv").write_text(text, encoding="utf-8")

    def found(**keys):
        source = Config(file=folder / "pairs.csv", **keys).build()
        return [source.read(i).extra["captions"] for i in range(len(source))]

    assert found() == [["x", "v"], ["z"]]
    assert found(split="train") == [["x"]]
    assert found(split="val") == [["z"], ["v"]]
    assert found(split="2", split_column="part") == [["v"]]
    assert found(caption_column="other") == [["y", "u"], ["w"]]
    assert found(group=False) == [["x"], ["z"], ["v"]]


def test_karpathy_splits(opened, folder):
    def of(split):
        return pairs(opened(karpathy(), "dataset_coco.json", split=split), folder)

    assert of("test") == [("b/c.jpg", ["four"])]
    assert of(["train", "restval"]) == [("a.png", ["one", "two"]), ("b/two words.png", ["three"])]
    assert len(of(None)) == 3
    with pytest.raises(ConfigError, match="no rows of split val, only of restval, test, train"):
        of("val")


def test_texts_beside_images(folder):
    (folder / "a.txt").write_text("first line\n\nsecond line\n", encoding="utf-8")
    (folder / "b/two words.txt").write_text("  \n", encoding="utf-8")
    source = Config(root=folder).build()
    assert pairs(source, folder) == [("a.png", ["first line\n\nsecond line"]), ("b/c.jpg", []), ("b/two words.png", [])]
    assert pairs(Config(root=folder, lines=True).build(), folder)[0] == ("a.png", ["first line", "second line"])
    assert has_captions(source)


def test_folder_without_texts_is_refused(folder):
    with pytest.raises(ConfigError, match=r"no \.txt beside any of 3 images below .*: .*/a\.txt does not exist"):
        Config(root=folder).build()


# ------------------------------------------------------------------------------------------------ rows and columns


def test_rows_of_one_image_are_its_captions_wherever_they_stand(opened, folder):
    rows = [("b/c.jpg", "one"), ("a.png", "two"), ("b/c.jpg", "three"), ("a.png", "four"), ("b/c.jpg", "five")]
    text = "image,caption\n" + "".join(f"{path},{caption}\n" for path, caption in rows)
    grouped = opened(text)
    assert pairs(grouped, folder) == [("b/c.jpg", ["one", "three", "five"]), ("a.png", ["two", "four"])]
    single = opened(text, group=False)
    assert pairs(single, folder) == [(path, [caption]) for path, caption in rows]
    assert single.identity != grouped.identity


def test_columns_by_name_and_number(opened, folder):
    text = "kind,where,short,long,part\nx,a.png,ball,a red ball,train\ny,b/c.jpg,egg,an egg,val\n"
    keys = {"path_column": "where", "split_column": "part"}
    assert pairs(opened(text, caption_column="long", split="val", **keys), folder) == [("b/c.jpg", ["an egg"])]
    assert pairs(opened(text, caption_column=["short", "long"], **keys), folder)[0] == ("a.png", ["ball", "a red ball"])
    assert pairs(opened("a.png,x,ball\n", caption_column=2), folder) == [("a.png", ["ball"])]


def test_cell_may_be_a_json_list(opened, folder):
    source = opened('filename\traw\na.png\t"[""one"", ""two""]"\nb/c.jpg\t[not a list\n')
    assert pairs(source, folder) == [("a.png", ["one", "two"]), ("b/c.jpg", ["[not a list"])]


def test_images_without_captions_are_left_out_and_named(opened, folder, caplog):
    source = opened("image,caption\na.png,\nb/c.jpg,an egg\nb/two words.png,  \n")
    assert pairs(source, folder) == [("b/c.jpg", ["an egg"])]
    assert "2 images without a caption are left out, the first is a.png" in caplog.text


def test_odd_characters_reach_nobody(opened, folder):
    (folder / "odd.csv").write_bytes(b"image,caption\na.png,caf\xe9 \xf0\x9f\x90\xb6\n")
    assert pairs(Config(file=folder / "odd.csv").build(), folder) == [("a.png", ["caf\ufffd\ufffd\ufffd 🐶"])]
    lines = r'{"image": "a.png", "caption": "half \ud83d and \u0000"}' + "\n" + r'{"image": "b/c.jpg", "caption": "x"}'
    (_, (caption,)), second = pairs(opened(lines, "odd.jsonl"), folder)
    assert caption.startswith("half ")
    assert second == ("b/c.jpg", ["x"])
    caption.encode()  # raises for half a character
    assert Tokenizer()([caption]).shape[0] == 1


# ------------------------------------------------------------------------------------------------ mistakes

COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2, "caption": "x"}]}


@pytest.mark.parametrize(
    ("name", "content", "keys", "message"),
    [
        ("x.csv", "", {}, r"x\.csv is empty; it must have one row per image and caption"),
        ("x.jsonl", "\n\n", {}, r"x\.jsonl is empty"),
        ("x.csv", "\n\n", {}, r"x\.csv is empty"),
        ("x.csv", "image,caption\n", {}, "no rows; it must have one row per image"),
        ("x.csv", "image,words\na.png,x\n", {}, r"which column holds the captions\? None is .*image, words"),
        ("x.csv", "where,caption\na,x\n", {}, r"which column holds the paths\?.*set path_column.*where, caption"),
        ("x.csv", "image,captoin\na.png,x\n", {"caption_column": "caption"}, "'caption'.*did you mean.*captoin"),
        ("x.csv", "image,caption,caption\na.png,x,y\n", {}, "'caption' twice"),
        ("x.csv", "a.png,x\n", {"caption_column": 7}, "caption_column is 7, but the columns are 0 to 1"),
        ("x.csv", "image,caption\na.png,x\nb/c.jpg\n", {}, r"x\.csv:3: 1 columns where 2 are needed"),
        ("x.csv", "image,caption\n,x\n", {}, r"x\.csv:2: no path in this row"),
        ("x.csv", "image,caption\na.png,\n", {}, "none of its 1 images has a caption; caption_column names"),
        ("x.csv", "url,caption\nhttp://h/a.jpg,x\n", {}, r":2: http://h/a\.jpg is an address and no file; download"),
        ("x.csv", 'image,caption\na.png,"' + "y" * 200_000, {}, "not readable as a table"),
        ("x.csv", "image,caption,split\na.png,x,train\n", {"split": "test"}, "no rows of split test, only of train"),
        ("x.csv", "image,caption\na.png,x\n", {"split": "test"}, r"no column 'split' \(split_column\)"),
        ("x.jsonl", '{"image": "a.png", "caption": "x"}\n{"image": \n', {}, r"x\.jsonl:2: not JSON \(Expecting value"),
        ("x.jsonl", '{"image": "a.png", "caption": "x"}\n["y"]\n', {}, r"x\.jsonl:2: \"\['y'\]\" is no object"),
        ("x.jsonl", '{"image": "a.png", "caption": "x"}\n{"caption": "y"}\n', {}, r"x\.jsonl:2: no 'image'"),
        ("x.jsonl", '{"image": "\\ud83d.png", "caption": "x"}\n', {}, r"x\.jsonl:1: .* is no path"),
        ("x.json", "[1, 2", {}, r"x\.json is not JSON"),
        ("x.json", {"info": 1}, {}, r"is an object with the keys info; known are a list of objects"),
        ("x.json", [{"image": "a.png", "caption": "x"}, {"image": 3}], {}, "entry 1: no 'image'"),
        ("x.json", COCO, {}, "annotation 0 is of image 2, which is not listed"),
        ("x.json", COCO, {"split": "test"}, "has no splits"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(opened, name, content, keys, message):
    with pytest.raises(ConfigError, match=message) as error:
        opened(content, name, **keys)
    assert name in str(error.value)


def test_missing_images_are_counted_and_the_first_named(opened, folder, caplog):
    text = "image,caption\n" + "".join(f"gone{n}.png,x\ngone{n}.png,y\n" for n in range(12)) + "a.png,a ball\n"
    with pytest.raises(ConfigError) as error:
        opened(text)
    assert "12 of 13 images are missing; relative paths start from" in error.value.problems[0]
    assert f"pairs.csv:2: {folder}/gone0.png does not exist" in error.value.problems[1]
    assert "and 2 more of the same" in error.value.problems[-1]
    assert pairs(opened(text, check_files="skip"), folder) == [("a.png", ["a ball"])]
    assert "12 missing images are left out, the first is gone0.png" in caplog.text
    unchecked = opened(text, check_files=False)
    assert len(unchecked) == 13
    with pytest.raises(FileNotFoundError):
        unchecked.read(0)
    with pytest.raises(ConfigError, match="none of its images exists"):
        opened("gone.png,x\n", check_files="skip")


def test_file_that_is_a_folder_or_absent(folder):
    with pytest.raises(ConfigError, match="is a folder: give it as `root`"):
        Config(file=folder).build()
    with pytest.raises(ConfigError, match="does not exist"):
        Config(file=folder / "no.csv").build()
    with pytest.raises(ConfigError, match="is no folder"):
        Config(file=folder / "no.csv", root=folder / "nowhere").build()
    with pytest.raises(ValueError, match="give `file`"):
        Config()


# ------------------------------------------------------------------------------------------------ the index


def test_file_is_read_once_and_again_when_it_changes(opened, folder, monkeypatch):
    text = "image,caption\na.png,one\n"
    first = opened(text)
    changed = (folder / "pairs.csv").stat().st_mtime_ns
    with monkeypatch.context() as context:
        context.setattr(CaptionRows, "add", lambda *_: pytest.fail("read again"))
        again = Config(file=folder / "pairs.csv").build()
    assert pairs(again, folder) == pairs(first, folder)
    opened(text.replace("one", "two"))
    os.utime(folder / "pairs.csv", ns=(0, changed + 10**9))
    assert pairs(Config(file=folder / "pairs.csv").build(), folder) == [("a.png", ["two"])]
    with pytest.raises(RuntimeError, match="was rebuilt while a run was using it"):
        pickle.loads(pickle.dumps(again))


def test_many_pairs_are_no_python_objects(opened, folder):
    text = "image,caption\n" + "".join(f"{n}.png,caption {n} of many\n" for n in range(25_000))
    source = opened(text, check_files=False)
    assert len(source) == 25_000
    assert len(pickle.dumps(source)) < 500
    for number in (0, 9_999, 10_000, 24_999):
        assert source._index.captions_of(number) == [f"caption {number} of many"]
        assert source.name_of(number) == f"{folder}/{number}.png"
    for number in (-1, 25_000):
        with pytest.raises(IndexError):
            source.name_of(number)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_from_a_table_to_batches(folder):
    (folder / "pairs.csv").write_text(as_table(",", ["image", "caption"]) + "a.png,a ball\n", encoding="utf-8")
    train = [{"name": "captions", "file": folder / "pairs.csv"}]
    data, _ = DataConfig(train=train).open()
    spec = ViewSpec((8, 8), tokenizer=Tokenizer())

    def texts(num_workers):
        batches = TrainLoader(data, spec, CropConfig(), batch_size=3, num_workers=num_workers).batches()
        taken = [batch for (batch,) in islice(batches, 4)]
        batches.close()
        return taken

    alone, workers = texts(0), texts(2)
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one["text"], other["text"])
        assert sorted(one["index"].tolist()) == [0, 1, 2]
    ball = {
        tuple(row[:5].tolist())
        for batch in alone
        for i, row in zip(batch["index"], batch["text"], strict=True)
        if i == 0
    }
    assert len(ball) == 2  # both captions of a.png come


def test_log_of_a_whole_file_is_quiet(opened, caplog):
    with caplog.at_level(logging.WARNING):
        opened(as_table(",", []))
    assert not caplog.text
