"""ImageNet-1K's validation images and the six sets that measure robustness, as their archives unpack.

root (`data/imagenet_layout.py` says what lies where) -> images with labels -> `Sample`.

One label per image is the set's own; `label_set` has all that count as right: ReaL's reassessed labels, and every
ImageNet class that ObjectNet's class covers. Labels are ImageNet-1K class indices, except in A and R, whose 200 classes
are numbered in the order of their WordNet ids; `rows` are their indices among the 1000.

ObjectNet's `own_classes` are its own 113 that overlap, by their own names: what a classifier made of texts tells apart.

Source: spec section 7; clip_and_eva02 section 3.1. The official ObjectNet evaluation counts the first mapped class only
and leaves the red border on; both are choices here (`label_set`, `crop_border`). ReaL goes by file name, not by
position.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from openeva.config import ConfigError
from openeva.data.decode import DecodeError
from openeva.data.imagenet_classes import class_names, subset_rows
from openeva.data.imagenet_layout import LayoutError, Listing, SetName, list_images, objectnet_class_names
from openeva.data.sources.base import Sample, SourceConfig

BORDER_PIXELS = 2
"""Width of what is cut off each side of an ObjectNet image where its red border should go."""


class Config(SourceConfig):
    """One of the seven sets.

    Attributes:
        set: "1k" (validation images), "v2" (matched frequency), "real", "a", "r", "sketch" or "objectnet".
        root: Its folder, as the archive unpacks; for "real" that of the 1K validation images.
        crop_border: Cut the red border off ObjectNet's images, as its authors ask; the official EVA numbers do not.
        own_classes: Label ObjectNet's images by its own classes, in lower case, instead of ImageNet's.
    """

    name: Literal["imagenet"] = "imagenet"
    set: SetName = "1k"
    root: Path
    crop_border: bool = False
    own_classes: bool = False

    def build(self) -> "ImageNet":
        """Open the set.

        Raises:
            ConfigError: Something is missing or does not belong there.
        """
        if self.crop_border and self.set != "objectnet":
            raise ConfigError([f"imagenet: only set objectnet has a border to crop, not {self.set}"])
        if self.own_classes and self.set != "objectnet":
            raise ConfigError([f"imagenet: only set objectnet has classes of its own, not {self.set}"])
        root = self.root.expanduser().absolute()
        try:
            listing = list_images(root, self.set)
            own = objectnet_class_names(listing, root) if self.own_classes else None
            return ImageNet(self.set, listing, self.crop_border, own)
        except LayoutError as error:
            raise ConfigError(error.problems) from None


class ImageNet:
    """The images of one set, sorted by path, as a `Source`.

    Attributes:
        set_name: Which set.
        rows: Of a 1000-way classifier, those that count: 200 ascending indices for A and R; None = all.
        num_classes: 200 for A and R, that of ObjectNet's `own_classes`, else 1000.
        class_names: By label.
        templates: Name of the texts that the classes are put into.
        identity: Two sources of the same identity have the same images in the same order, with the same labels.
    """

    templates = "imagenet"

    def __init__(
        self,
        set_name: SetName,
        listing: Listing,
        crop_border: bool = False,
        own_classes: Mapping[str, str] | None = None,
    ) -> None:
        """Number the classes; `own_classes` are folder -> name of ObjectNet's where these count."""
        self.set_name = set_name
        self._folder, self._images, self._crop_border = listing.folder, listing.images, crop_border
        self.rows = subset_rows("a" if set_name == "a" else "r") if set_name in {"a", "r"} else None
        self.class_names = [class_names()[row] for row in self.rows or range(1000)]
        self._label_of = {row: label for label, row in enumerate(self.rows or range(1000))}
        if own_classes is not None:
            number = {folder: label for label, folder in enumerate(own_classes)}
            self.class_names, self._label_of = list(own_classes.values()), {n: n for n in number.values()}
            self._images = [image._replace(labels=(number[image.path.split("/")[0]],)) for image in listing.images]
        self.num_classes = len(self.class_names)
        digest = hashlib.sha256("\n".join(f"{image.path} {image.labels}" for image in listing.images).encode())
        self.identity = f"imagenet {set_name} {digest.hexdigest()[:16]}{' without border' if crop_border else ''}"
        self.identity += " by its own classes" if own_classes is not None else ""

    def __len__(self) -> int:
        return len(self._images)

    def label_set(self, index: int) -> tuple[int, ...]:
        """All labels of an image that count as right, the set's own first."""
        return tuple(self._label_of[row] for row in self._images[index].labels)

    def labels(self) -> npt.NDArray[np.int64]:
        """The first label of every image."""
        return np.array([self._label_of[image.labels[0]] for image in self._images], np.int64)

    def name_of(self, index: int) -> str:
        """Path of an image."""
        return str(self._folder / self._images[index].path)

    def read(self, index: int) -> Sample:
        """An image with the first of its labels.

        Raises:
            OSError: It has vanished or cannot be read.
        """
        data = (self._folder / self._images[index].path).read_bytes()
        image = _without_border(data) if self._crop_border else data
        return Sample(image, self.name_of(index), self.label_set(index)[0])


def _without_border(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.crop((BORDER_PIXELS, BORDER_PIXELS, image.width - BORDER_PIXELS, image.height - BORDER_PIXELS))
    except UnidentifiedImageError:
        raise DecodeError("not an image, or of an unknown format") from None
