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

ImageLike = str | Path | bytes | Image.Image | npt.NDArray[Any] | Tensor


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
            image: See `pixels_of`.

        Raises:
            OSError: Not an image, or a broken one.
            ValueError: An array of another shape or type.
        """
        image_YXC = pixels_of(image)
        rng = random.Random(random.getrandbits(64) if self.random else 0)
        crop = self.crop.draw(image_YXC.shape[0], image_YXC.shape[1], rng, self.image_size)
        view_CYX = self.crop.cut(self.crop.jitter(image_YXC, rng), crop, self.image_size)
        return normalise(self.crop.augment(view_CYX, self.mean, rng)[None], self.mean, self.std)[0]

    @property
    def random(self) -> bool:
        """Whether the same image may look different each time."""
        crop = self.crop
        return crop.kind != "center" or bool(0 < crop.hflip < 1 or crop.color_jitter or crop.randaugment)


def pixels_of(image: ImageLike) -> RGB:
    """RGB pixels of an image, uint8 `[Y, X, 3]`.

    Args:
        image: A path, encoded bytes, a Pillow image, an array `[Y, X]` or `[Y, X, 1 | 3 | 4]`, or a tensor `[3, Y, X]`;
            arrays and tensors of bytes, or of floats in 0..1.

    Raises:
        OSError: Not an image, or a broken one.
        ValueError: An array of another shape, or with values that are neither bytes nor in 0..1.
    """
    if isinstance(image, str | Path):
        return decode(Path(image).expanduser().read_bytes())
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.permute(1, 2, 0) if image.ndim == 3 and image.shape[0] in {1, 3, 4} else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{type(image).__name__} is no image; give a path, bytes, Pillow image, array or tensor")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in {2, 3} or (image.ndim == 3 and image.shape[2] not in {3, 4}) or 0 in image.shape:
        raise ValueError(f"shape {tuple(image.shape)} is no image; give [Y, X], [Y, X, 3] or a tensor [3, Y, X]")
    if image.dtype != np.uint8:
        if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"{image.dtype} values must be floats in 0..1 or bytes (uint8), not normalised: that is done here"
            )
        image = np.rint(image * 255).astype(np.uint8)
    return to_rgb(Image.fromarray(np.ascontiguousarray(image)))
