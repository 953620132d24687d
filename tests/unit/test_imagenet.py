"""ImageNet's sets on disk: what is recognised, what is said about what is missing, and `openeva data check`."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from e2e.imagenet_sets import REAL, V2_FOLDER, VAL, A, folder_of, wordnet_index, write_images, write_sets
from openeva.cli import app
from openeva.config import ConfigError
from openeva.data import imagenet_layout
from openeva.data.imagenet_classes import real_labels, subset_rows, wordnet_ids
from openeva.data.imagenet_layout import FACTS, SETS, SetName, check_layout, survey_beneath
from openeva.data.sources.imagenet import Config, ImageNet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_sets(tmp_path)


def source(name: SetName, root: Path, **options: object) -> ImageNet:
    return Config.model_validate({"set": name, "root": root, **options}).build()


# ------------------------------------------------------------------------------------------------------- reading


def test_labels_of_a_are_positions_among_its_200_classes(root: Path) -> None:
    opened = source("a", root / "imagenet-a")
    rows = subset_rows("a")
    assert opened.num_classes == len(opened.class_names) == len(rows) == 200
    for index in range(len(opened)):
        folder = Path(opened.name_of(index)).parent.name
        assert rows[opened.read(index).label] == wordnet_ids().index(folder)
    assert opened.labels().tolist() == [opened.read(index).label for index in range(len(opened))]


def flat(root: Path) -> list[str]:
    """The validation images in one folder; returns the WordNet id of image 1, 2, ..."""
    for path in VAL:
        (root / "val" / path).rename(root / "val" / Path(path).name)
        (root / "val" / folder_of(path)).rmdir() if not list((root / "val" / folder_of(path)).iterdir()) else None
    by_number = {int(path[-13:-5]): folder_of(path) for path in VAL}
    return [by_number.get(number, wordnet_ids()[0]) for number in range(1, 11)]


@pytest.mark.parametrize("kind", ["tensorflow", "kaggle"])
def test_validation_images_in_one_folder(kind: str, root: Path) -> None:
    expected = {Path(path).name: wordnet_index(path) for path in VAL}
    ids = flat(root / "imagenet")
    with pytest.raises(ConfigError, match="not sorted into class folders, and none of LOC_val_solution"):
        source("1k", root / "imagenet")
    if kind == "tensorflow":
        file, lines = "imagenet_2012_validation_synset_labels.txt", ids
    else:
        rows = [f"ILSVRC2012_val_{n:08d},{i} 1 2 3 4 {i} 5 6 7 8 " for n, i in enumerate(ids, start=1)]
        file, lines = "LOC_val_solution.csv", ["ImageId,PredictionString", *reversed(rows)]
    (root / "imagenet" / file).write_text("\n".join(lines) + "\n")
    opened = source("1k", root / "imagenet")
    found = {Path(opened.name_of(i)).name: opened.read(i).label for i in range(len(opened))}
    assert found == expected
    real = source("real", root / "imagenet")
    assert {real.label_set(i) for i in range(len(real))} == {tuple(REAL[n - 1]) for n in (1, 2, 4, 7, 8, 9)}


def test_real_labels_come_with_timm_where_the_folder_has_none(root: Path) -> None:
    (root / "imagenet" / "real.json").unlink()
    opened = source("real", root / "imagenet")
    for index in range(len(opened)):
        number = int(opened.name_of(index)[-13:-5])
        assert opened.label_set(index) == real_labels()[number - 1]
    assert len(opened) == sum(bool(real_labels()[int(path[-13:-5]) - 1]) for path in VAL)
    assert (len(real_labels()), sum(map(bool, real_labels()))) == (50_000, FACTS["real"].num_images)


def test_the_border_of_objectnet_can_be_cut_off(root: Path) -> None:
    whole, cut = (source("objectnet", root / "objectnet-1.0", crop_border=crop) for crop in (False, True))
    image = cut.read(0).image
    assert isinstance(image, Image.Image)
    with Image.open(whole.name_of(0)) as original:
        assert image.size == (original.width - 4, original.height - 4)
        assert original.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((0, 0)) != (255, 0, 0)
    assert whole.identity != cut.identity
    with pytest.raises(ConfigError, match="only set objectnet has a border"):
        source("v2", root / V2_FOLDER, crop_border=True)


# ------------------------------------------------------------------------------------------------------- missing


def messages(root: Path, name: SetName) -> str:
    return "\n".join(check_layout(root, name))


def test_a_missing_piece_has_a_message_of_its_own(root: Path) -> None:
    assert "does not exist" in messages(root / "nothing", "v2")
    assert "imagenetv2-matched-frequency.tar.gz" in messages(root / "nothing", "v2")
    text = messages(root / "imagenet-a", "a")
    assert "5 of 200 class folders with images" in text
    assert f"missing are {wordnet_ids()[17]}" in text  # the first class of A that the copy lacks
    assert "5 of 7,500 images" in text
    text = messages(root / "imagenet", "1k")
    assert "8 of 50,000 images" in text
    assert "n01440764 (class 0) has 2, n01443537 (class 1) has 1" in text
    assert "missing are 3, 4, 5, 6, 7 ..." in messages(root / V2_FOLDER, "v2")


def test_folders_of_another_set_are_not_taken_for_this_one(root: Path) -> None:
    assert "no class of this set" in messages(root / "imagenet-r", "a")
    (root / V2_FOLDER / "1000").mkdir()
    assert "no class of this set: 1000" in messages(root / V2_FOLDER, "v2")
    with pytest.raises(ConfigError, match="no class of this set: 1000"):
        source("v2", root / V2_FOLDER)


def test_mappings_of_objectnet_must_be_there_and_fit(root: Path) -> None:
    folder = root / "objectnet-1.0"
    (folder / "mappings" / "imagenet_to_label_2012_v2").unlink()
    assert "mappings lacks imagenet_to_label_2012_v2" in messages(folder, "objectnet")
    (folder / "mappings" / "imagenet_to_label_2012_v2").write_text("other names\n")
    assert "do not fit each other" in messages(folder, "objectnet")
    shutil.rmtree(folder / "mappings")
    assert "mappings/" in messages(folder, "objectnet")


def test_real_labels_that_do_not_cover_the_images(root: Path) -> None:
    (root / "imagenet" / "real.json").write_text("[[1], [2]]")
    assert "no labels for 6 images" in messages(root / "imagenet", "real")
    (root / "imagenet" / "real.json").write_text("{")
    assert "not valid JSON" in messages(root / "imagenet", "real")


def complete(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """From here on, these few images are all that there ought to be."""
    for name in SETS:
        found = survey_beneath(root, name)
        fewer = {"num_classes": found.num_classes, "num_images": found.num_images, "per_class": None}
        monkeypatch.setitem(imagenet_layout.FACTS, name, replace(FACTS[name], **fewer))


def test_data_check_shows_what_is_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["data", "check", "imagenet", str(root)])
    assert result.exit_code == 1
    for facts in FACTS.values():
        assert facts.title in result.stdout
    assert result.stdout.count("incomplete") == 7
    assert "ImageNet-A: 5 of 7,500 images" in result.stdout
    complete(monkeypatch, root)
    result = CliRunner().invoke(app, ["data", "check", "imagenet", str(root)])
    assert result.exit_code == 0, result.output
    shutil.rmtree(root / "sketch")
    result = CliRunner().invoke(app, ["data", "check", "imagenet", str(root)])
    assert result.exit_code == 1
    assert result.stdout.count("missing") == 1
    assert "no folder sketch or imagenet-sketch" in result.stdout
    assert "ImageNet-Sketch.zip" in result.stdout


def test_a_folder_of_1k_itself_may_hold_the_others(root: Path) -> None:
    (root / "imagenet" / "val").rename(root / "val")
    found = survey_beneath(root, "1k")
    assert (found.root, found.num_images) == (root, len(VAL))
    write_images(root / "val" / "n99999999", {"a.JPEG": 0})
    assert "no class of this set: n99999999" in str(survey_beneath(root, "1k").problems)
    assert survey_beneath(root, "a").num_images == len(A)
