"""One image to what a model takes: the loader's own steps for use outside of runs.

path, bytes, Pillow image or array -> RGB -> crop -> RandAugment where asked -> normalised `[3, Y, X]`

Source: the same as `views.py`, whose functions it calls in the loader's order.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from openeva.data.decode import RGB, decode, to_rgb
from openeva.data.views import CropConfig, normalise

ImageLike = str | Path | bytes | Image.Image | npt.NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """Callable on one image; give it to a data set of torchvision, or call it.

    Attributes:
        crop: What is cut out.
        image_size: `(rows, columns)` in pixels.
        mean: Of each channel, for images scaled to 0..1.
        std: Of each channel.
    """

    crop: CropConfig
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: ImageLike) -> Float[Tensor, "3 Y X"]:
        """The normalised view; chance comes from Python's `random`, which torch seeds in the workers of a loader.

        Args:
            image: A path, encoded bytes, a Pillow image, or an array `[Y, X]` or `[Y, X, 3]` of bytes.

        Raises:
            OSError: Not an image, or a broken one.
            ValueError: An array of another shape or type.
        """
        image_YXC = _pixels(image)
        rng = random.Random(random.getrandbits(64) if self.random else 0)
        crop = self.crop.draw(image_YXC.shape[0], image_YXC.shape[1], rng)
        view_CYX = self.crop.cut(self.crop.jitter(image_YXC, rng), crop, self.image_size)
        return normalise(self.crop.augment(view_CYX, self.mean, rng)[None], self.mean, self.std)[0]

    @property
    def random(self) -> bool:
        """Whether the same image may look different each time."""
        crop = self.crop
        return crop.kind != "center" or bool(0 < crop.hflip < 1 or crop.color_jitter or crop.randaugment)


def _pixels(image: ImageLike) -> RGB:
    if isinstance(image, str | Path):
        return decode(Path(image).expanduser().read_bytes())
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{type(image).__name__} is no image; give a path, bytes, a Pillow image or an array")
    if image.dtype != np.uint8 or image.ndim not in {2, 3} or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(
            f"an array of shape {image.shape} and type {image.dtype} is no image; give uint8, [Y, X] or [Y, X, 3]"
        )
    return to_rgb(Image.fromarray(image))
