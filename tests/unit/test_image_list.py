import csv
import pickle
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from openeva.config import ConfigError, validate
from openeva.data.labels import class_counts
from openeva.data.loader import DataConfig
from openeva.data.mixture import label_problems, open_sources, write_held_out
from openeva.data.sources.image_list import Config

ROWS = [("a/1.png", "dog"), ("a/2.png", "cat"), ("b/3.jpg", "dog")]


@pytest.fixture
def table(tmp_path):
    """Writes a table beside files that exist, and opens it."""
    for path, _ in ROWS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())

    def opened(text: str, **keys):
        (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
        return Config(file=tmp_path / "labels.csv", **keys).build()

    return opened


def rows(source):
    return [
        (Path(source.read(i).name).name, source.class_names[label] if (label := source.read(i).label) >= 0 else None)
        for i in range(len(source))
    ]


EXPECTED = [("1.png", "dog"), ("2.png", "cat"), ("3.jpg", "dog")]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("header", ["", "path,label\n", "Image,Class\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_kinds_of_tables(table, delimiter, header, end):
    text = (header + "".join(f"{path},{label}\n" for path, label in ROWS)).replace(",", delimiter).replace("\n", end)
    source = table("\ufeff" + text + end)
    assert rows(source) == EXPECTED
    assert source.class_names == ["cat", "dog"]
    assert source.labels().tolist() == [1, 0, 1]
    assert [source.name_of(i) for i in range(3)] == [source.read(i).name for i in range(3)]
    assert source.read(2).image == b"b/3.jpg"
    assert rows(pickle.loads(pickle.dumps(source))) == EXPECTED


def test_columns_by_name_and_by_number(table):
    text = "id,kind,where,split\n" + "".join(f"{n},{label},{path},s{n % 2}\n" for n, (path, label) in enumerate(ROWS))
    assert rows(table(text, path_column="where", label_column="kind")) == EXPECTED
    assert rows(table(text, label_column="kind", split="s0")) == [EXPECTED[0], EXPECTED[2]]  # path: the cells tell
    assert rows(table(text, label_column="kind", split="s1", split_column=3)) == [EXPECTED[1]]
    plain = "".join(f"{n},{label},{path}\n" for n, (path, label) in enumerate(ROWS))
    assert rows(table(plain, label_column=1)) == EXPECTED
    assert rows(table(text, labels=False)) == [(path, None) for path, _ in EXPECTED]
    only = table("\n".join(path for path, _ in ROWS))
    assert (only.num_classes, only.labels().tolist()) == (0, [-1] * 3)


def test_quoted_names_roots_and_odd_bytes(tmp_path):
    (tmp_path / "images").mkdir()
    names = [b"a, b.png", b"\xff\xfe.png", 'ä "q".png'.encode()]
    for name in names:
        (tmp_path / "images" / name.decode("utf-8", "surrogateescape")).write_bytes(name)
    file = tmp_path / "labels.csv"
    file.write_bytes(b'"a, b.png",0\n\xff\xfe.png,1\n"' + names[2].replace(b'"', b'""') + b'",0\n')
    source = Config(file=file, root=tmp_path / "images").build()
    assert [source.read(i).image for i in range(3)] == names
    absolute = tmp_path / "absolute.csv"
    absolute.write_text(f'path,label\n"{tmp_path}/images/a, b.png",x\n')
    assert Config(file=absolute, root=tmp_path / "elsewhere").build().read(0).image == names[0]


# ---------------------------------------------------------------------------------------------------------- labels


def test_whole_numbers_are_class_numbers(table):
    source = table("path,label\na/1.png,2\na/2.png,0\nb/3.jpg,2\n")
    assert source.class_names == ["0", "1", "2"]
    assert source.labels().tolist() == [2, 0, 2]
    assert class_counts(source).tolist() == [1, 0, 2]
    assert "no images (1)" in label_problems(open_sources([Config(file=source_file(source))]), None)[0]
    named = table("path,label\na/1.png,2\na/2.png,0\nb/3.jpg,2\n", classes=["ant", "bee", "cow"])
    assert rows(named) == [("1.png", "cow"), ("2.png", "ant"), ("3.jpg", "cow")]
    kept = table("path,label\na/1.png,11\na/2.png,5\nb/3.jpg,11\n", classes=["5", "11"])
    assert kept.labels().tolist() == [1, 0, 1]


def source_file(source):
    return Path(source.name_of(0)).parents[1] / "labels.csv"


def test_given_classes_keep_their_order_and_number(table):
    source = table("a/1.png,dog\na/2.png,cat\n", classes=["dog", "emu", "cat"])
    assert (source.class_names, source.labels().tolist()) == (["dog", "emu", "cat"], [0, 2])
    assert label_problems(open_sources([Config(file=source_file(source), classes=["dog", "emu", "cat"])]), None) == []


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_any_word_can_be_a_class(tmp_path_factory, labels):
    file = tmp_path_factory.mktemp("t") / "labels.csv"
    with file.open("w", encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([["path", "label"], *([f"{n}.png", label] for n, label in enumerate(labels))])
    assume(not all(label.removeprefix("-").isdecimal() for label in labels))
    source = Config(file=file, check_files=False).build()
    assert [source.class_names[label] for label in source.labels()] == labels


# -------------------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_is_told_at_once_with_its_line(table):
    text = "path,label\na/1.png,dog\na/2.png,\n,cat\nb/3.jpg\npath,label\n\nb/3.jpg,dgo\n"
    with pytest.raises(ConfigError) as error:
        table(text, classes=["dog", "cat"])
    told = "\n".join(error.value.problems)
    assert len(error.value.problems) == 5
    for line in ("3: a/2.png has no label", "4: no path", "5: 1 columns where 2 are needed",
                 "6: the header once more", "8: label 'dgo' is not in `classes`; did you mean 'dog'?"):  # fmt: skip
        assert f"labels.csv:{line}" in told


def test_missing_files_are_counted_and_the_first_ten_named(table, tmp_path):
    text = "path,label\na/1.png,dog\n" + "".join(f"gone/{n}.png,cat\n" for n in range(25))
    with pytest.raises(ConfigError) as error:
        table(text)
    told = error.value.problems
    assert "25 of 26 files are missing" in told[0]
    assert f"relative paths start from {tmp_path}" in told[0]
    assert told[1].endswith(f"labels.csv:3: {tmp_path}/gone/0.png does not exist")
    assert "and 15 more of the same" in told[-1]
    assert len(told) == 12
    assert len(table(text, check_files=False)) == 26


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("", {}, "labels.csv is empty"),
        ("path,label\n", {}, "no rows"),
        ("path,label,label\na/1.png,x,y\n", {}, "labels.csv:1: the header has 'label' twice"),
        ("path,a,b\na/1.png,x,y\n", {}, r"which column holds the labels\? Set label_column \(of path, a, b\)"),
        ("path,kind\na/1.png,x\n", {"label_column": "kimd"}, r"no column 'kimd' .* did you mean 'kind'.*path, kind"),
        ("a/1.png,x\n", {"path_column": 2}, "path_column is 2, but the columns are 0 to 1"),
        ("x,y\nfoo,bar\n", {}, "which column holds the paths"),
        ("path,label\na/1.png,x\n", {"split": "train"}, r"no column 'split' \(split_column\)"),
        ("path,label,split\na/1.png,x,val\n", {"split": "train"}, "no rows with 'train' as split, only val"),
        ("a/1.png,-1\na/2.png,1\n", {}, "label -1 is negative"),
        ("a/1.png,3\na/2.png,20260101\n", {}, "the largest is 20260101"),
        ("a/1.png,x\n", {"classes": ["x", "x"]}, "`classes` has 'x' twice"),
        ('a/1.png,"x\n' + "y" * 200_000, {}, "not readable as a table"),
    ],
)
def test_what_is_wrong_with_a_table(table, text, keys, message):
    with pytest.raises(ConfigError, match=message):
        table(text, **keys)


def test_what_is_no_table(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; give a table .*labels\.csv"):
        Config(file=tmp_path / "nothing.csv").build()
    with pytest.raises(ConfigError, match=r"is a folder .*image_folder"):
        Config(file=tmp_path).build()


# -------------------------------------------------------------------------------------------------- held-out lists


def test_a_list_of_held_out_images_is_such_a_table(tmp_path):
    for number in range(12):
        path = tmp_path / "data" / ("dog", "cat")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "labels.csv").write_text(
        "".join(f"data/{('dog', 'cat')[n % 2]}/{n}.png,{('dog', 'cat')[n % 2]}\n" for n in range(12))
    )
    train = {"train": [{"name": "image_list", "file": str(tmp_path / "labels.csv")}]}
    rest, val = validate(DataConfig, {**train, "holdout": 0.34}).open()
    assert class_counts(val).tolist() == [2, 2]
    write_held_out(val, tmp_path / "held_out.csv")
    listed = open_sources([Config(file=tmp_path / "held_out.csv")])
    assert {listed.name_of(i): listed.labels()[i] for i in range(4)} == {
        val.name_of(i): val.labels()[i] for i in range(4)
    }
    again, same = validate(DataConfig, {**train, "holdout": str(tmp_path / "held_out.csv")}).open()
    assert (again.identity, same.identity) == (rest.identity, val.identity)
