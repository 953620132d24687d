"""The twelve sets that EVA-CLIP's zero-shot classification is measured on: what they are called and where they lie.

folders -> `open_benchmarks` -> `ImageSet`s (name, title, source) and why the others are not there

Source: clip_and_eva02 section 3.2: six ImageNet sets, CIFAR-10 and -100, UCF-101 and Kinetics-400, -600, -700, of whose
videos one frame counts. Others may lie wherever they are: `data/sources/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from openeva.config import ConfigError
from openeva.data.imagenet_layout import FACTS, SetName, find_set, survey
from openeva.data.sources.imagenet import Config as ImageNetConfig
from openeva.data.sources.torchvision import Config as TorchvisionConfig
from openeva.data.sources.video_folder import Config as VideoConfig

Benchmark = Literal[
    "imagenet_1k", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet",
    "cifar10", "cifar100", "ucf101", "kinetics400", "kinetics600", "kinetics700",
]  # fmt: skip
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)
IMAGENET: dict[Benchmark, SetName] = {
    "imagenet_1k": "1k", "imagenet_v2": "v2", "imagenet_a": "a", "imagenet_r": "r", "imagenet_sketch": "sketch",
    "objectnet": "objectnet",
}  # fmt: skip
CIFAR: dict[Benchmark, str] = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
KINETICS: tuple[Benchmark, ...] = ("kinetics400", "kinetics600", "kinetics700")
TITLES: dict[Benchmark, str] = {
    **{name: FACTS[place].title for name, place in IMAGENET.items()},
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "ucf101": "UCF-101",
    "kinetics400": "Kinetics-400", "kinetics600": "Kinetics-600", "kinetics700": "Kinetics-700",
}  # fmt: skip
NUM_CLASSES: dict[Benchmark, int] = {"ucf101": 101, "kinetics400": 400, "kinetics600": 600, "kinetics700": 700}
"""Of the sets of videos, which come as links or in parts, so that classes may be missing."""
UCF_TEST = "testlist01.txt"
"""List of UCF-101's first test split; where it lies beside the videos, only those count."""

Roots = Mapping[Benchmark | Literal["imagenet"], Path]
"""Folder of each set; `imagenet` is one that holds the ImageNet sets under their usual names."""


@dataclass(frozen=True)
class ImageSet:
    """Images with classes.

    Attributes:
        key: Name in metrics; "" for the only one.
        title: For people.
        source: The images; None for those that a run holds out.
        note: What a reader of the numbers should know.
    """

    key: str
    title: str
    source: Any = None
    note: str = ""


def open_benchmarks(
    roots: Roots, wanted: Sequence[Benchmark] | None = None, *, allow_incomplete: bool = False, download: bool = False
) -> tuple[list[ImageSet], dict[str, str]]:
    """The sets that are there, and by title why the others are not.

    Args:
        roots: Where they lie.
        wanted: Which ones; default: all.
        allow_incomplete: Take ImageNet sets of which images are missing.
        download: Let torchvision fetch CIFAR into its folder.

    Raises:
        ConfigError: None is there, or one that is there is damaged.
    """
    found: list[ImageSet] = []
    missing: dict[str, str] = {}
    problems: list[str] = []
    for name in wanted or BENCHMARKS:
        root = _root_of(name, roots, download=download)
        if root is None:
            missing[TITLES[name]] = _why_missing(name, roots)
            continue
        try:
            found.append(_open(name, root, allow_incomplete, download))
        except ConfigError as error:
            problems += error.problems
    if problems or not found:
        problems = problems or [f"{title}: {reason}" for title, reason in missing.items()]
        raise ConfigError(problems, "zero-shot sets (key `roots`, or --imagenet FOLDER, says where they are)")
    return found, missing


def _root_of(name: Benchmark, roots: Roots, *, download: bool) -> Path | None:
    """Where a set lies; None where it does not."""
    if name in roots:
        root = roots[name].expanduser().absolute()
        return root if root.is_dir() or (download and name in CIFAR) else None
    if name in IMAGENET and "imagenet" in roots and (common := roots["imagenet"].expanduser().absolute()).is_dir():
        return find_set(common, IMAGENET[name])
    return None


def _why_missing(name: Benchmark, roots: Roots) -> str:
    if name in roots:
        return f"{roots[name]} does not exist"
    if name in IMAGENET and "imagenet" in roots:
        places = " or ".join(place for place in FACTS[IMAGENET[name]].folders if place != ".")
        return f"no folder {places} in {roots['imagenet']}"
    return "no folder given"


def _open(name: Benchmark, root: Path, allow_incomplete: bool, download: bool) -> ImageSet:
    title = TITLES[name]
    if name in IMAGENET:
        place = IMAGENET[name]
        state = survey(root, place)
        if state.problems and not (allow_incomplete and state.num_images):
            hint = "; `allow_incomplete: true` measures on what is there" if state.num_images else ""
            raise ConfigError([f"{problem}{hint}" for problem in state.problems])
        source: Any = ImageNetConfig(set=place, root=root, own_classes=place == "objectnet").build()
        return ImageSet(name, title, source, "; ".join(state.problems))
    if name in CIFAR:
        return ImageSet(name, title, TorchvisionConfig(dataset=CIFAR[name], root=root, download=download).build())
    if name != "ucf101":
        videos = VideoConfig(root=_first_folder(root / "val", root)).build()
        return ImageSet(name, title, videos, _other_classes(name, videos.num_classes))
    places = (root, root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist", root.parent)
    listed = next((place / UCF_TEST for place in places if (place / UCF_TEST).is_file()), None)
    videos = VideoConfig(root=_first_folder(root / "UCF-101", root), list_file=listed).build()
    notes = [
        "" if listed else f"{title}: all videos, since {UCF_TEST} of its test split is not beside them",
        _other_classes(name, videos.num_classes),
    ]
    return ImageSet(name, title, videos, "; ".join(filter(None, notes)))


def _other_classes(name: Benchmark, found: int) -> str:
    wanted = NUM_CLASSES[name]
    return "" if found == wanted else f"{TITLES[name]}: {found} classes, not {wanted}: not to be compared"


def _first_folder(*places: Path) -> Path:
    return next(place for place in places if place.is_dir())
