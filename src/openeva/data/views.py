"""What is cut out of an image: the crop that student and teacher share, resized for each of them, and its mask.

RGB `[Y, X, 3]` -> `CropConfig.draw` (box, flip) -> `cut` (uint8 `[3, Y', X']`, once per size) -> `augment` ->
`normalise` on the device.

Source: official pre-training transform (flip first, then one box for both sizes), evaluation transform (shorter side
resized, centre cut), fine-tuning transform (box, then flip, then RandAugment: to mirror a box that was drawn on the
mirrored image is the same thing) and the linear probe's (one try for the box). Difference: resizing by torch's 8-bit
kernel, which is three times as fast as Pillow's and at most two levels of 255 away from it (`resizer: pillow` has the
official bytes); normalisation happens on the device, so that batches travel as bytes.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tv

from openeva.config import Config
from openeva.data.augment import apply_rand_augment, check_rand_augment
from openeva.data.decode import RGB
from openeva.data.masking import MaskGenerator


@dataclass(frozen=True)
class ViewSpec:
    """What a task wants to see of each sample.

    Attributes:
        image_size: `(rows, columns)` in pixels of the model's input.
        target_size: The same for the second copy of the crop that a target looks at; None = it takes the first.
        masking: Draws the hidden patches; None = no mask.
        mean: Mean colour of the model's statistics, 0 to 1; what RandAugment moves away from leaves it behind.
        tokenizer: Makes token ids `[B, L]` of captions, L as short as they allow; None = no text is read.
    """

    image_size: tuple[int, int]
    target_size: tuple[int, int] | None = None
    masking: MaskGenerator | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None

    @property
    def second_size(self) -> tuple[int, int] | None:
        """Size of the second copy where one is needed."""
        return None if self.target_size == self.image_size else self.target_size


class Crop(NamedTuple):
    """A cut through one image: a box in pixels of the image as it lies, to be mirrored after cutting if `flip`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class CropConfig(Config):
    """How a view is cut out of an image.

    Attributes:
        kind: "random" = mirror, then random resized crop; "byol" = the same with a single try, whose sides are cut to
            those of the image (the paper's linear probe); "center" = shorter side resized to `size / crop_pct`, then
            the centre: the same pixels every time, for evaluation and for cached teacher features.
        scale: Share of the image's area that a random crop covers, (least, largest).
        ratio: Width / height of a random crop, (least, largest).
        hflip: Probability of mirroring.
        crop_pct: Share of the resized shorter side that the centre crop keeps.
        interpolation: Resampling kernel, antialiased.
        resizer: "pillow" for the very bytes of the official code, at a third of the speed; None = torch's 8-bit kernel,
            at most two levels of 255 away.
        color_jitter: Largest relative change of brightness, contrast and saturation; 0 = off.
        randaugment: RandAugment after cutting, as in "rand-m9-mstd0.5-inc1"; None = off.
    """

    kind: Literal["random", "center", "byol"] = "random"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = Field(0.5, ge=0, le=1)
    crop_pct: float = Field(0.875, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resizer: Literal["pillow"] | None = None
    color_jitter: float = Field(0.0, ge=0, le=1)
    randaugment: Annotated[str, AfterValidator(check_rand_augment)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "CropConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is (least, largest) with 0 < least <= largest <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is (least, largest) with 0 < least <= largest, not {self.ratio}")
        if self.color_jitter and self.randaugment:
            raise ValueError("color_jitter and randaugment exclude each other, as in the official recipes: choose one")
        return self

    def draw(self, height: int, width: int, rng: random.Random) -> Crop:
        """The crop of an image of this size."""
        flip = rng.random() < self.hflip
        if self.kind == "center":
            return Crop(0, 0, height, width, flip)
        box = one_box if self.kind == "byol" else random_box
        top, left, box_height, box_width = box(height, width, self.scale, self.ratio, rng)
        if flip:  # the box was drawn on the mirrored image
            left = width - left - box_width
        return Crop(top, left, box_height, box_width, flip)

    def jitter(self, image_YXC: RGB, rng: random.Random) -> RGB:
        """The image with brightness, contrast and saturation changed in random order, if `color_jitter` is on."""
        if not self.color_jitter:
            return image_YXC
        image_CYX = torch.from_numpy(image_YXC).permute(2, 0, 1)
        changes = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
        rng.shuffle(changes)
        for change in changes:
            image_CYX = change(image_CYX, rng.uniform(max(0.0, 1 - self.color_jitter), 1 + self.color_jitter))
        return image_CYX.permute(1, 2, 0).numpy()

    def cut(self, image_YXC: RGB, crop: Crop, size: tuple[int, int]) -> UInt8[Tensor, "3 Y X"]:
        """The crop, resized to `size` (rows, columns) and mirrored if it says so."""
        box_YXC = image_YXC[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        box_CYX = torch.from_numpy(box_YXC).permute(2, 0, 1)  # channels-last memory: the fast path of the resize kernel
        if self.kind == "center":
            resized = _covering_size((crop.height, crop.width), size, self.crop_pct)
            view_CYX = tv.center_crop(self._resize(box_CYX, resized), list(size))
        else:
            view_CYX = self._resize(box_CYX, size)
        return view_CYX.flip(-1) if crop.flip else view_CYX

    def _resize(self, image_CYX: UInt8[Tensor, "3 Y X"], size: tuple[int, int]) -> UInt8[Tensor, "3 y x"]:
        if image_CYX.shape[1:] == size:
            return image_CYX
        if self.resizer == "pillow":
            kernel = Image.Resampling[self.interpolation.upper()]
            image = Image.fromarray(image_CYX.permute(1, 2, 0).numpy()).resize(size[::-1], kernel)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return interpolate(image_CYX[None], size, mode=self.interpolation, antialias=True, align_corners=False)[0]

    def augment(
        self, view_CYX: UInt8[Tensor, "3 Y X"], mean: tuple[float, float, float], rng: random.Random
    ) -> UInt8[Tensor, "3 Y X"]:
        """The cut view after RandAugment, if that is on."""
        return view_CYX if self.randaugment is None else apply_rand_augment(view_CYX, self.randaugment, mean, rng)


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random resized crop: 10 tries, then the largest centred box of a valid ratio."""
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def one_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Like `random_box` with a single try, whose sides are cut to those of the image."""
    area, aspect = rng.uniform(*scale) * height * width, math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = min(max(1, round(math.sqrt(area * aspect))), width), min(max(1, round(math.sqrt(area / aspect))), height)
    return rng.randint(0, height - h), rng.randint(0, width - w), h, w


def _covering_size(size: tuple[int, int], wanted: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """Size of an image of `size` scaled to just cover `wanted / crop_pct`, rounded as the official code does."""
    rows, columns = int(wanted[0] / crop_pct), int(wanted[1] / crop_pct)
    height, width = size
    if columns * height >= rows * width:
        return max(rows, int(columns * height / width)), columns
    return rows, max(columns, int(rows * width / height))


def target_pixels(batch: dict[str, Any]) -> UInt8[Tensor, "B 3 Y X"]:
    """The copy of the crop that a target looks at: its own where a batch of the loader has one, else the model's."""
    pixels_BCYX: Tensor = batch["target_image"] if "target_image" in batch else batch["image"]
    return pixels_BCYX


def normalise(
    image_BCYX: UInt8[Tensor, "B 3 Y X"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B 3 Y X"]:
    """Bytes to numbers on whatever device they are: `(image / 255 - mean) / std`, per channel.

    The constants are filled in on the device instead of copied to it, since a copy would wait for the device.
    """

    def per_channel(values: list[float]) -> Tensor:
        return torch.cat([torch.full((1, 1, 1), v, device=image_BCYX.device) for v in values])

    scale = per_channel([1 / (255 * s) for s in std])
    shift = per_channel([-m / s for m, s in zip(mean, std, strict=True)])
    return image_BCYX.float().mul_(scale).add_(shift).to(dtype)  # in place: one new tensor instead of three
