"""Names of the classes that a classifier tells apart, and where they come from.

weights -> the run's own names | ImageNet-1K | ImageNet-21K | Kinetics-400 | numbers

Source: the official models number ImageNet classes by sorted WordNet id; both lists used here are in that order
(ImageNet-21K is the release of autumn 2011 with 21,841 classes). Official video models number the classes of Kinetics
by sorted name (spec section 3.2 of video), as torchvision's list of them does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openeva.data import imagenet_classes

IMAGENET_1K, IMAGENET_21K, KINETICS_400 = 1000, 21841, 400


@dataclass(frozen=True)
class ClassNames:
    """Names by class number.

    Attributes:
        names: One per class.
        source: Where they come from, in words.
    """

    names: Sequence[str]
    source: str


def class_names(num_classes: int, config: Mapping[str, Any] | None = None, *, of_videos: bool = False) -> ClassNames:
    """The names of a classifier's classes.

    Args:
        num_classes: V.
        config: Content of an openeva model's `config.json`; empty or None for weights from elsewhere, whose 1,000 or
            21,841 classes are then taken for ImageNet's, and 400 of a video model for those of Kinetics-400.
        of_videos: The classifier is that of a video model.

    Raises:
        ValueError: The config names another number of classes.
    """
    if own := _recorded(config or {}):
        if len(own) != num_classes:
            raise ValueError(
                f"config.json names {len(own)} classes, but the classifier has {num_classes}; were its files mixed up?"
            )
        return ClassNames(own, "the run")
    if not config or "converted_from" in config:
        if of_videos:
            return _kinetics(num_classes)
        if num_classes == IMAGENET_1K:
            return ClassNames(imagenet_classes.class_names(), "ImageNet-1K (open_clip's names)")
        if num_classes == IMAGENET_21K:
            from timm.data.imagenet_info import ImageNetInfo

            info = ImageNetInfo("imagenet-22k")
            names = [info.index_to_description(number) for number in range(num_classes)]
            return ClassNames(names, "ImageNet-21K (timm's names, from WordNet)")
    return _numbers(num_classes)


def _kinetics(num_classes: int) -> ClassNames:
    if num_classes != KINETICS_400:
        return _numbers(num_classes)
    from torchvision.models._meta import _KINETICS400_CATEGORIES

    return ClassNames(_KINETICS400_CATEGORIES, "Kinetics-400 (torchvision's names)")


def _numbers(num_classes: int) -> ClassNames:
    return ClassNames([str(number) for number in range(num_classes)], "numbers, since the weights name no classes")


def _recorded(config: Mapping[str, Any]) -> list[str]:
    task = config.get("task")
    for place in (config, task if isinstance(task, Mapping) else {}):
        if names := place.get("class_names"):
            return [str(name) for name in names]
    return []
