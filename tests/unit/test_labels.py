"""Labels of data: names, counts, held-out shares of each class, few labels, balance, and what goes wrong with them."""

import csv
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from openeva.config import validate
from openeva.data.labels import by_class, class_counts, class_names_of, labels_of
from openeva.data.loader import DataConfig, EvalLoader, TrainLoader
from openeva.data.mixture import Mixture, balanced, label_problems, open_sources, write_held_out
from openeva.data.sources import elpv, image_folder, scenes
from openeva.data.sources.base import Sample
from openeva.data.subset import Part, hold_out
from openeva.data.views import CropConfig, ViewSpec
from openeva.train import Recipe, train

CENTER = CropConfig(kind="center", hflip=0.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))


def folders(root: Path, **counts: int) -> str:
    """One folder per class with so many images, each of another size."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20 + number % 7, 18 + number % 5), (number, 0, 0)).save(root / name / f"{number:03d}.png")
    return str(root)


def config(*roots: str, **keys):
    sources = [{"name": "image_folder", "roots": root, "labels": True} for root in roots]
    few = {key: keys.pop(key) for key in ("shots", "label_fraction", "shots_seed") if key in keys}
    return validate(DataConfig, {"train": [{**source, **few} for source in sources], **keys})


def names(data):
    return {data.name_of(index) for index in range(len(data))}


class Listed:
    """Labels and nothing else."""

    def __init__(self, labels, num_classes=None):
        self._labels = np.array(labels)
        self.num_classes = num_classes or int(self._labels.max()) + 1

    def __len__(self):
        return len(self._labels)

    def read(self, index):
        return Sample(b"", str(index), int(self._labels[index]))

    def labels(self):
        return self._labels


class Opaque:
    """Labels that only reading tells."""

    num_classes = 2

    def __len__(self):
        return 2

    def read(self, index):
        return Sample(b"", str(index), index)


# ------------------------------------------------------------------------------------------ known without reading


@pytest.mark.parametrize(
    "source",
    [elpv.Config(split="val"), elpv.Config(limit=50), scenes.Config(num_images=30, size=16)],
    ids=["elpv", "limit", "scenes"],
)
def test_labels_and_names_are_those_of_the_samples(source):
    data = open_sources([source])
    samples = [data.read(index) for index in range(0, len(data), 7)]
    assert [sample.label for sample in samples] == data.labels()[::7].tolist()
    assert [sample.name for sample in samples] == [data.name_of(index) for index in range(0, len(data), 7)]
    assert class_counts(data).sum() == len(data)
    assert len(class_counts(data)) == data.num_classes == len(data.class_names)


def test_class_names():
    assert elpv.Config().build().class_names == ["functional", "defective"]
    assert scenes.Config().build().class_names[:2] == ["disc", "square"]
    assert class_names_of(Listed([0, 2])) == ["0", "1", "2"]
    assert Part(scenes.Config().build(), 0, 5).class_names[0] == "disc"
    assert Mixture([Listed([0, 1])], [1.0]).class_names == ["0", "1"]


def test_labels_of_an_image_folder(tmp_path):
    folders(tmp_path / "data", dog=3, ant=2)
    source = image_folder.Config(roots=[tmp_path / "data"], labels=True).build()
    assert labels_of(source).tolist() == [source.read(i).label for i in range(5)]
    assert class_counts(source).tolist() == [2, 3]
    assert source.name_of(4) == source.read(4).name
    unlabelled = image_folder.Config(roots=[tmp_path / "data"]).build()
    assert labels_of(unlabelled).tolist() == [-1] * 5


def test_a_class_of_one_name_is_one_class_in_all_sources(tmp_path):
    """Also in held-out images with fewer classes, whose own numbers are others."""
    train = [folders(tmp_path / "a", dog=2, cat=1), folders(tmp_path / "b", emu=2, dog=1)]
    val = {"name": "image_folder", "roots": folders(tmp_path / "v", emu=1, cat=2), "labels": True}
    train, val = config(*train, val=[val]).open()
    assert train.class_names == val.class_names == ["cat", "dog", "emu"]
    for data in (train, val):
        for index in range(len(data)):
            sample = data.read(index)
            assert Path(sample.name).parent.name == data.class_names[sample.label]
            assert data.labels()[index] == sample.label
    assert class_counts(val).tolist() == [2, 0, 1]


@settings(max_examples=50)
@given(labels=st.lists(st.integers(-1, 4), min_size=1, max_size=60), key=st.none() | st.integers(0, 2**64 - 1))
def test_by_class_lists_each_labelled_sample_once(labels, key):
    found = by_class(np.array(labels), 5, key)
    assert [sorted(members.tolist()) for members in found] == [
        [index for index, label in enumerate(labels) if label == wanted] for wanted in range(5)
    ]


# ------------------------------------------------------------------------------------------------------ held out


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=12), share=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_every_class_gives_its_share_and_keeps_some(sizes, share, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    if max(sizes) == 1:
        with pytest.raises(ValueError, match="one image each"):
            hold_out(Listed(labels), share)
        return
    train, held = hold_out(Listed(labels), share)
    kept = [train.read(i).name for i in range(len(train))]
    out = [held.read(i).name for i in range(len(held))]
    assert sorted(map(int, kept + out)) == list(range(len(labels)))
    assert out
    for size, left in zip(sizes, class_counts(train).tolist(), strict=True):
        assert left >= 1
        assert left == 1 or abs((size - left) - share * size) <= 1.5
    again = hold_out(Listed(labels), share)[1]
    assert [again.read(i).name for i in range(len(again))] == out


def test_held_out_images_are_listed_and_stay_held_out(tmp_path):
    root = folders(tmp_path / "data", dog=20, ant=10)
    train, val = config(root, holdout=0.2).open()
    assert class_counts(val).tolist() == [2, 4]
    file = tmp_path / "held_out.csv"
    write_held_out(val, file)
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert {row["path"] for row in rows} == names(val)
    assert Counter(row["label"] for row in rows) == {"dog": 4, "ant": 2}
    for number in range(50, 60):
        Image.new("RGB", (20, 20)).save(Path(root) / "ant" / f"{number}.png")
    assert names(config(root, holdout=0.2).open()[1]) != names(val)
    for data in (config(root, holdout=str(file)), config(root, holdout=0.2)):
        more, same = data.open(kept=file)
        assert names(same) == names(val)
        assert names(more) == names(train) | {str(Path(root) / "ant" / f"{n}.png") for n in range(50, 60)}


def test_a_list_of_other_images_is_an_error(tmp_path, caplog):
    root = folders(tmp_path / "data", dog=3, ant=3)
    file = tmp_path / "held_out.csv"
    file.write_text("path,label\nelsewhere.png,dog\n")
    with pytest.raises(
        ValueError, match=r"1 of the 1 images that .*held_out\.csv lists are not among data\.train \(else"
    ):
        config(root, holdout=str(file)).open()
    file.write_text(f"path,label\nelsewhere.png,dog\n{root}/dog/000.png,dog\n")
    assert len(config(root, holdout=str(file)).open()[1]) == 1
    assert "elsewhere.png" in caplog.text
    with pytest.raises(ValueError, match="does not exist; give a share"):
        config(root, holdout="nothing.csv").open()
    file.write_text("file\na.png\n")
    with pytest.raises(ValueError, match="no column `path`"):
        config(root, holdout=str(file)).open()


# ----------------------------------------------------------------------------------------------------- few labels


def test_shots_are_seeded_nested_and_leave_the_held_out_images_alone(tmp_path):
    root = folders(tmp_path / "data", dog=30, ant=12, emu=9)
    whole, val = config(root, holdout=0.2).open()
    few = {}
    for shots in (1, 3, 6):
        few[shots], same_val = config(root, holdout=0.2, shots=shots).open()
        assert class_counts(few[shots]).tolist() == [shots] * 3
        assert names(same_val) == names(val)
    assert names(few[1]) < names(few[3]) < names(few[6]) < names(whole)
    again = config(root, holdout=0.2, shots=3).open()[0]
    assert names(again) == names(few[3])
    assert names(config(root, holdout=0.2, shots=3, shots_seed=1).open()[0]) != names(few[3])
    assert len({str(data.identity) for data in (whole, *few.values())}) == 4


def test_a_share_of_the_labels_is_taken_from_every_class(tmp_path):
    root = folders(tmp_path / "data", dog=40, ant=20, emu=2)
    tenth, half = (config(root, label_fraction=share).open()[0] for share in (0.1, 0.5))
    assert class_counts(tenth).tolist() == [2, 4, 1]
    assert class_counts(half).tolist() == [10, 20, 1]
    assert names(tenth) < names(half)
    assert len(config(root, label_fraction=1).open()[0]) == 62


def test_too_few_images_and_no_labels_are_errors(tmp_path):
    root = folders(tmp_path / "data", dog=9, ant=2, emu=3)
    with pytest.raises(
        ValueError, match=r"data\.train\.0\.shots is 4, but 2 of 3 classes have fewer .* ant has 2, emu has 3"
    ):
        config(root, shots=4).open()
    unlabelled = validate(DataConfig, {"train": [{"name": "image_folder", "roots": root, "shots": 2}]})
    with pytest.raises(ValueError, match=r"data\.train\.0\.shots takes images of each class, but .* no labels"):
        unlabelled.open()
    with pytest.raises(ValidationError, match="not both"):
        image_folder.Config(roots=[tmp_path], shots=2, label_fraction=0.1)


# -------------------------------------------------------------------------------------------------------- balance


@pytest.mark.parametrize(("balance", "shares"), [(0.0, [0.8, 0.15, 0.05]), (1.0, [1 / 3] * 3), (0.5, None)])
def test_balance_is_an_exponent_of_class_sizes(tmp_path, balance, shares):
    sizes = np.array([160, 30, 10])
    data = balanced(Mixture([Listed(np.repeat(np.arange(3), sizes))], [1.0]), balance)
    if shares is None:
        shares = (np.sqrt(sizes) / np.sqrt(sizes).sum()).tolist()
    assert len(data) == 200
    order = TrainLoader(data, ViewSpec((8, 8)), CENTER, batch_size=4)
    assert order.samples_per_epoch == 200

    class Pixels(Listed):
        def read(self, index):
            return Sample(Image.new("RGB", (8, 8)), str(index), int(self._labels[index]))

    source = balanced(Mixture([Pixels(np.repeat(np.arange(3), sizes))], [1.0]), balance)
    loader = TrainLoader(source, ViewSpec((8, 8)), CENTER, batch_size=8)
    labels = np.concatenate([step[0]["label"].numpy() for step in islice(loader.batches(), 50)])
    assert (np.bincount(labels) / len(labels)).tolist() == pytest.approx(shares, abs=0.02)
    evaluated = [
        label for batch in EvalLoader(source, ViewSpec((8, 8)), CENTER, batch_size=50) for label in batch["label"]
    ]
    assert np.bincount(evaluated).tolist() == sizes.tolist()


def test_balance_needs_labels_and_no_other_weights(tmp_path):
    root = folders(tmp_path / "data", dog=3, ant=3)
    unlabelled = validate(DataConfig, {"train": [{"name": "image_folder", "roots": root}], "balance": 0.5})
    with pytest.raises(ValueError, match=r"data\.balance needs labels, but data\.train\.0 has none"):
        unlabelled.open()
    with pytest.raises(ValueError, match="leave out the `weight`"):
        balanced(Mixture([Listed([0, 1]), Listed([0, 1])], [1.0, 2.0]), 1.0)
    opaque = Mixture([Opaque()], [1.0])
    with pytest.raises(ValueError, match="of Opaque are only known when its images are read"):
        balanced(opaque, 1.0)


# ------------------------------------------------------------------------------------------------- what goes wrong


def problems(train, val=None):
    sources = [{"name": "image_folder", "roots": root, "labels": True} for root in (train, val) if root]
    return label_problems(*validate(DataConfig, {"train": sources[:1], "val": sources[1:]}).open())


def test_one_class_empty_classes_and_unknown_classes_are_named(tmp_path):
    good = folders(tmp_path / "good", dog=2, ant=2)
    assert problems(good, folders(tmp_path / "less", ant=1)) == []
    (one,) = problems(folders(tmp_path / "one", dog=3))
    assert "one class only (dog)" in one
    empty = folders(tmp_path / "empty", dog=2, ant=2)
    (tmp_path / "empty" / "emu").mkdir()
    (text,) = problems(empty)
    assert "1 of its 3 classes have no images (emu)" in text
    listed = image_folder.Config(roots=[empty], labels=True, classes=["ant", "dog", "emu"])
    assert label_problems(open_sources([listed]), None) == []
    (text,) = problems(good, folders(tmp_path / "more", dog=1, cow=1, emu=1))
    assert "2 classes that data.train does not have: cow, emu (those of data.train: ant, dog)" in text
    unlabelled = open_sources([image_folder.Config(roots=[good]), scenes.Config(num_images=3)])
    (text,) = label_problems(unlabelled, None)
    assert text.startswith("data.train.0 has no labels")


# ------------------------------------------------------------------------------------------------------- batches


def test_evaluation_batches_name_their_images_of_whatever_size(tmp_path):
    root = folders(tmp_path / "data", dog=9, ant=8)
    (tmp_path / "data/dog/004.png").write_bytes(b"broken")
    data = config(root).open()[0]
    seen = {}
    for rank in (0, 1):
        loader = EvalLoader(
            data, ViewSpec((16, 16)), CENTER, batch_size=3, rank=rank, world_size=2, num_workers=rank, max_broken=1
        )
        for batch in loader:
            assert batch["image"].shape[1:] == (3, 16, 16)
            for name, label in zip(batch["name"], batch["label"].tolist(), strict=True):
                assert name not in seen
                seen[name] = data.class_names[label]
    assert len(seen) == 16
    assert all(Path(name).parent.name == label for name, label in seen.items())


# -------------------------------------------------------------------------------------------------------- whole run


def test_a_continued_run_holds_out_the_same_images_when_more_are_added(tmp_path):
    root = folders(tmp_path / "data", dog=12, ant=8)
    backbone = {
        "name": "vit",
        "image_size": 32,
        "patch_size": 8,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "mlp_hidden": 32,
    }

    def run(length):
        content = {
            "task": {"name": "classify", "backbone": backbone, "mixup": {"cutmix": 1.0}, "erasing": {"prob": 0.5}},
            "data": {
                "train": [{"name": "image_folder", "roots": root, "labels": True}], "holdout": 0.3, "balance": 0.5,
                "crop": {"randaugment": "rand-m9-mstd0.5-inc1"}, "num_workers": 0,
            },
            "optim": {"warmup": "0 steps"},
            "run": {"out": tmp_path / "run", "length": length, "batch_size": 4, "device": "cpu",
                    "evaluate_every": "1 steps", "log_every": "1 steps"},
        }  # fmt: skip
        return train(validate(Recipe, content))

    assert run("1 steps").status == "finished"
    listed = (tmp_path / "run/held_out.csv").read_text()
    assert Counter(row["label"] for row in csv.DictReader(listed.splitlines())) == {"dog": 4, "ant": 2}
    for number in range(50, 60):
        Image.new("RGB", (20, 20)).save(tmp_path / "data/ant" / f"{number}.png")
    assert run("2 steps").step == 2
    assert (tmp_path / "run/held_out.csv").read_text() == listed
