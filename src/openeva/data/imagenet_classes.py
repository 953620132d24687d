"""The classes of ImageNet-1K and of the sets built on it, as they stand in installed packages.

timm's and open_clip's data files -> WordNet ids, class names, the 200 classes of ImageNet-A and -R, the ReaL labels.

Source: spec section 7: class index = position of the WordNet id in sorted order; the rows of the 200-way heads ascend.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Literal

VAL_NAME = "ILSVRC2012_val_{:08d}"
"""Stem of the files of the ImageNet-1K validation images, which are numbered from 1."""


@cache
def wordnet_ids() -> tuple[str, ...]:
    """`n01440764` ..., by class index."""
    return tuple(_timm_file("imagenet_synsets.txt").split())


@cache
def class_names() -> tuple[str, ...]:
    """English names by class index, as curated for CLIP: nearly all are told apart by the name alone."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # heavy: only where names are asked for

    return tuple(IMAGENET_CLASSNAMES)


@cache
def subset_rows(subset: Literal["a", "r"]) -> tuple[int, ...]:
    """Class indices of the 200 classes of ImageNet-A or -R, ascending: the rows of the 1000-way head that count."""
    return tuple(int(row) for row in _timm_file(f"imagenet_{subset}_indices.txt").split())


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """The reassessed labels of the 50,000 validation images in the order of their numbers; some have none."""
    return tuple(tuple(labels) for labels in json.loads(_timm_file("imagenet_real_labels.json")))


def _timm_file(name: str) -> str:
    spec = importlib.util.find_spec("timm")  # found, not imported: its data files need no code
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8")
