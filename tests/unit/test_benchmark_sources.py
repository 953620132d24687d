"""Data sets that zero-shot classification is measured on: videos by their middle frame, torchvision's sets."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from e2e.videos import write_video
from openeva.checkpoints.published_clip import published_zero_shot
from openeva.config import ConfigError, validate
from openeva.data.sources import clip_benchmark, torchvision, video_folder
from openeva.data.sources.torchvision import benchmark_name
from openeva.data.video import Video


def grey(image: Image.Image) -> float:
    return float(np.asarray(image.convert("L")).mean())


# ------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv"])
@pytest.mark.parametrize("num_frames", [1, 2, 9, 30])
def test_the_middle_frame_counts(num_frames: int, ending: str, tmp_path: Path) -> None:
    greys = np.linspace(20, 230, num_frames).astype(int).tolist()
    path = tmp_path / f"one.{ending}"
    write_video(path, greys)
    image = Video(path).middle()
    assert (image.mode, image.size) == ("RGB", (48, 48))
    assert grey(image) == pytest.approx(greys[num_frames // 2], abs=3)


def test_broken_videos_are_errors_of_reading(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "b.mp4").write_bytes(b"")
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        with pytest.raises(OSError, match=name):
            Video(tmp_path / name).middle()


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for number, path in enumerate(("yoga/b.avi", "yoga/a.MP4", "Archery/c.avi")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_video(tmp_path / "one.avi", [60 + 60 * number] * 3)
        (tmp_path / "one.avi").rename(tmp_path / path)
    (tmp_path / "yoga" / "notes.txt").write_text("no video")
    (tmp_path / "bowling").mkdir()  # a class whose videos are missing
    (tmp_path / "ucfTrainTestlist").mkdir()  # no class
    (tmp_path / "ucfTrainTestlist" / "testlist01.txt").write_text("yoga/b.avi 3\n\nArchery/c.avi\n")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def of_videos(root: Path, **changes: Any) -> Any:
    return validate(video_folder.Config, {"root": root, **changes}).build()


def test_folders_are_classes(videos: Path) -> None:
    source = of_videos(videos)
    assert source.class_names == ["Archery", "bowling", "yoga"]
    assert source.labels().tolist() == [0, 2, 2]
    sample = source.read(1)
    assert (sample.label, sample.name) == (2, str(videos / "yoga" / "a.MP4"))
    assert grey(sample.image.middle()) == pytest.approx(120, abs=3)
    listed = of_videos(videos, list_file=videos / "ucfTrainTestlist" / "testlist01.txt")
    assert [listed.name_of(number) for number in range(len(listed))] == [
        str(videos / "yoga" / "b.avi"), str(videos / "Archery" / "c.avi"),
    ]  # fmt: skip
    assert listed.labels().tolist() == [2, 0]


def test_missing_videos_are_told(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (videos / "other.txt").write_text("yoga/z.avi\nyoga/b.avi\n")
    for changes, said in (
        ({"root": videos / "nowhere"}, "nowhere does not exist; say where the videos are"),
        ({"list_file": videos / "other.txt"}, r"1 videos of .*other.txt are not below .*: yoga/z.avi"),
        ({"list_file": videos / "none.txt"}, "there is no list"),
        ({"extensions": ["webm"]}, "no videos in the class folders .* must end in webm"),
    ):
        with pytest.raises(ConfigError, match=said):
            of_videos(**{"root": videos, **changes})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"needs PyAV: pip install 'openeva\[video\]'"):
        of_videos(videos)


# -------------------------------------------------------------------------------------------------- torchvision


class Tiny:
    """A data set in the manner of torchvision, with a split by flag."""

    classes = ("aquarium_fish", "cat")

    def __init__(self, root: Path, train: bool = True, transform: Any = None, download: bool = False) -> None:
        if not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.targets = [0, 1] if train else [1]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (index, 0, 0)), self.targets[index]


def of_torchvision(**changes: Any) -> Any:
    return validate(torchvision.Config, {"dataset": "CIFAR100", "root": "nowhere", **changes}).build()


def test_splits_names_and_labels_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR100", Tiny)
    source = of_torchvision(download=True)
    assert (source.class_names, source.labels().tolist(), source.templates) == (
        ["aquarium_fish", "cat"],
        [1],
        "cifar100",
    )
    sample = source.read(0)
    assert (sample.image.size, sample.label, sample.name) == ((8, 8), 1, "CIFAR100 test 0")
    assert of_torchvision(download=True, split="train").labels().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "CIFAR_10"}, r"no data set 'CIFAR_10'; did you mean 'CIFAR10'"),
        ({"dataset": "Kinetics"}, "no data set 'Kinetics'"),  # videos, which need more to be told
        ({"dataset": "FakeData"}, "no data set 'FakeData'"),
        ({}, "CIFAR100 in nowhere: Dataset not found or corrupted; unpack its archive there, or set download: true"),
        ({"split": "val"}, "CIFAR100 has the splits train and test, not 'val'"),
        ({"dataset": "Food101", "split": "val"}, "Food101 in nowhere: .*train.*test"),
    ],
)
def test_wrong_data_sets_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        of_torchvision(**changes)


# ----------------------------------------------------------------------------------------------- clip_benchmark


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In the place of that package; keeps what it was asked for."""
    asked: dict[str, Any] = {}
    module = ModuleType("clip_benchmark.datasets.builder")

    def build_dataset(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        if name == "wds/imagenet1k":
            return object()
        if name == "unknown":
            raise ValueError("Unsupported dataset: unknown.")
        data = Tiny(Path(), train=False, download=True)
        data.templates = ["a photo of the {c}, a kind of thing."]  # type: ignore[attr-defined]
        return data

    tasks = {"flickr30k": "zeroshot_retrieval"}
    module.build_dataset = build_dataset  # type: ignore[attr-defined]
    module.get_dataset_default_task = lambda name: tasks.get(name, "zeroshot_classification")  # type: ignore[attr-defined]
    for name in ("clip_benchmark", "clip_benchmark.datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def of_clip_benchmark(root: Path, **changes: Any) -> Any:
    return validate(clip_benchmark.Config, {"dataset": "food101", "root": root, **changes}).build()


def test_data_sets_of_clip_benchmark_bring_their_texts(builder: dict[str, Any], tmp_path: Path) -> None:
    source = of_clip_benchmark(tmp_path)
    assert builder == {
        "name": "food101", "root": str(tmp_path), "transform": None, "split": "test", "download": False,
    }  # fmt: skip
    assert source.class_names == ["aquarium_fish", "cat"]
    assert source.templates == ["a photo of the {c}, a kind of thing."]
    assert (source.read(0).label, source.read(0).name) == (1, "food101 test 0")


def test_what_clip_benchmark_cannot_give_is_told(builder: dict[str, Any], tmp_path: Path) -> None:
    for root, dataset, said in (
        (tmp_path / "no", "food101", "no does not exist; say where it is, or set download: true"),
        (tmp_path, "flickr30k", "has captions or sentences, not classes; use the source captions"),
        (tmp_path, "unknown", "Unsupported dataset: unknown"),
        (tmp_path, "wds/imagenet1k", "is a stream there"),
    ):
        with pytest.raises(ConfigError, match=said):
            of_clip_benchmark(root, dataset=dataset)


def test_without_the_package_the_fix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(ConfigError, match="pip install clip-benchmark"):
        of_clip_benchmark(tmp_path)


def test_names_of_torchvision_lead_to_the_benchmarks_texts_and_numbers() -> None:
    names = ("OxfordIIITPet", "Flowers102", "FGVCAircraft", "StanfordCars", "Food101", "CIFAR100")
    found = [benchmark_name(name) for name in names]
    assert found == ["pets", "flowers", "fgvc_aircraft", "cars", "food101", "cifar100"]
    assert set(found) <= set(published_zero_shot("eva_clip_psz14"))
