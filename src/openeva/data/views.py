"""What is cut out of an image: the crop that student and teacher share, resized for each of them, and its mask.

RGB `[Y, X, 3]`, or the frames of a clip `[T, Y, X, 3]` -> `CropConfig.draw` (box, flip: one for all frames) -> `cut`
(uint8 `[3, Y', X']`, once per size) -> `augment` -> `normalise` on the device.

Source: official pre-training transform (flip first, then one box for both sizes), evaluation transform (shorter side
resized, centre cut), fine-tuning transform (box, then flip, then RandAugment: to mirror a box that was drawn on the
mirrored image is the same thing) and the linear probe's (one try for the box). Difference: resizing by torch's 8-bit
kernel, which is three times as fast as Pillow's and at most two levels of 255 away from it (`resizer: pillow` has the
official bytes); normalisation happens on the device, so that batches travel as bytes.
Clips: spec section 3.4 and 3.5 of video; colours change by the same amount in all frames, where the official code lets
them flicker (quirk 6).
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
from openeva.data.clips import ClipSpec
from openeva.data.decode import RGB
from openeva.data.masking import MaskGenerator

Pixels = RGB
"""`[Y, X, 3]`, or `[T, Y, X, 3]` of a clip."""


@dataclass(frozen=True)
class ViewSpec:
    """What a task wants to see of each sample.

    Attributes:
        image_size: `(rows, columns)` in pixels of the model's input.
        target_size: The same for the second copy of the crop that a target looks at; None = it takes the first.
        masking: Draws the hidden patches; None = no mask.
        mean: Mean colour of the model's statistics, 0 to 1; what RandAugment moves away from leaves it behind.
        tokenizer: Makes token ids `[B, L]` of captions, L as short as they allow; None = no text is read.
        clip: Which frames of a video; None = one image, of a video the one in its middle.
    """

    image_size: tuple[int, int]
    target_size: tuple[int, int] | None = None
    masking: MaskGenerator | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None
    clip: ClipSpec | None = None

    @property
    def second_size(self) -> tuple[int, int] | None:
        """Size of the second copy where one is needed."""
        return None if self.target_size == self.image_size else self.target_size


Share = Annotated[float, Field(ge=0, le=1)]


class Crop(NamedTuple):
    """A cut through one image: a box in pixels of the image as it lies, to be mirrored after cutting if `flip`.

    Of kind "multiscale" the box is one of the image after its first resize.
    """

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
            the centre: the same pixels every time, for evaluation and for cached teacher features; "multiscale" =
            shorter side resized to `size / crop_pct`, then a box of one of ten shapes in a corner or the middle.
        scale: Share of the image's area that a random crop covers, (least, largest).
        ratio: Width / height of a random crop, (least, largest).
        hflip: Probability of mirroring.
        crop_pct: Share of the resized shorter side that the centre crop keeps.
        interpolation: Resampling kernel.
        antialias: Whether it averages where it shrinks; the official code does for images, not for clips.
        resizer: "pillow" for the very bytes of the official code, at a third of the speed; None = torch's 8-bit kernel,
            at most two levels of 255 away.
        color_jitter: Largest relative change of brightness, contrast and saturation, or one for each of them and, as a
            fourth, the largest change of hue in turns (0..0.5); 0 = off.
        jitter_prob: Probability that colours are jittered at all.
        grey_prob: Probability that a view is grey.
        randaugment: RandAugment after cutting, as in "rand-m9-mstd0.5-inc1"; None = off.
    """

    kind: Literal["random", "center", "byol", "multiscale"] = "random"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = Field(0.5, ge=0, le=1)
    crop_pct: float = Field(0.875, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    resizer: Literal["pillow"] | None = None
    color_jitter: Share | tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] = 0.0
    jitter_prob: float = Field(1.0, ge=0, le=1)
    grey_prob: float = Field(0.0, ge=0, le=1)
    randaugment: Annotated[str, AfterValidator(check_rand_augment)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "CropConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is (least, largest) with 0 < least <= largest <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is (least, largest) with 0 < least <= largest, not {self.ratio}")
        if (self.color_jitter or self.grey_prob) and self.randaugment:
            raise ValueError("color_jitter and randaugment exclude each other, as in the official recipes: choose one")
        return self

    def draw(self, height: int, width: int, rng: random.Random, size: tuple[int, int] | None = None) -> Crop:
        """The crop of an image of this size; "multiscale" must know the `size` (rows, columns) of the view."""
        flip = rng.random() < self.hflip
        if self.kind == "center":
            return Crop(0, 0, height, width, flip)
        if self.kind == "multiscale":
            if size is None:
                raise ValueError("a multiscale crop depends on the size of the view; pass size")
            resized = covering_size((height, width), size, self.crop_pct, clip=True)
            return Crop(*multiscale_box(resized, size, rng.randrange, rng.randrange), flip)
        box = one_box if self.kind == "byol" else random_box
        top, left, box_height, box_width = box(height, width, self.scale, self.ratio, rng)
        if flip:  # the box was drawn on the mirrored image
            left = width - left - box_width
        return Crop(top, left, box_height, box_width, flip)

    def jitter(self, image_YXC: Pixels, rng: random.Random) -> Pixels:
        """The image or all frames of a clip with colours changed alike, in random order, if that is on."""
        if not (self.color_jitter or self.grey_prob):
            return image_YXC
        image_CYX = torch.from_numpy(image_YXC).movedim(-1, -3)
        if self.color_jitter and (self.jitter_prob == 1 or rng.random() < self.jitter_prob):
            image_CYX = self._jittered(image_CYX, rng)
        if self.grey_prob and rng.random() < self.grey_prob:
            image_CYX = tv.rgb_to_grayscale(image_CYX, num_output_channels=3)
        return image_CYX.movedim(-3, -1).numpy()

    def _jittered(self, image_CYX: Tensor, rng: random.Random) -> Tensor:
        most = self.color_jitter if isinstance(self.color_jitter, tuple) else (self.color_jitter,) * 3
        functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
        changes = list(zip(functions, most, strict=False))
        if len(most) > len(functions):
            changes.append((tv.adjust_hue, most[-1]))
        rng.shuffle(changes)
        for change, largest in changes:
            hue = change is tv.adjust_hue
            amount = rng.uniform(-largest if hue else max(0.0, 1 - largest), largest if hue else 1 + largest)
            image_CYX = change(image_CYX, amount)
        return image_CYX

    def cut(self, image_YXC: Pixels, crop: Crop, size: tuple[int, int]) -> UInt8[Tensor, "*T 3 Y X"]:
        """The crop, resized to `size` (rows, columns) and mirrored if it says so; of a clip, of all its frames."""
        if self.kind == "multiscale":
            whole_CYX = torch.from_numpy(image_YXC).movedim(-1, -3)
            whole_CYX = self._resize(whole_CYX, covering_size(image_YXC.shape[-3:-1], size, self.crop_pct, clip=True))
            rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
            view_CYX = self._resize(whole_CYX[..., rows, columns], size)
            return view_CYX.flip(-1) if crop.flip else view_CYX
        box_YXC = image_YXC[..., crop.top : crop.top + crop.height, crop.left : crop.left + crop.width, :]
        box_CYX = torch.from_numpy(box_YXC).movedim(-1, -3)  # channels-last memory: the fast path of the resize kernel
        if self.kind == "center":
            clip = image_YXC.ndim == 4
            resized = covering_size((crop.height, crop.width), size, self.crop_pct, clip=clip)
            view_CYX = tv.center_crop(self._resize(box_CYX, resized), list(size))
        else:
            view_CYX = self._resize(box_CYX, size)
        return view_CYX.flip(-1) if crop.flip else view_CYX

    def three_cuts(self, image_YXC: Pixels, size: tuple[int, int]) -> UInt8[Tensor, "3 *T 3 Y X"]:
        """The first, last and middle view along the longer side, with the shorter side resized to just fit."""
        whole_CYX = torch.from_numpy(image_YXC).movedim(-1, -3)
        whole_CYX = self._resize(whole_CYX, covering_size(image_YXC.shape[-3:-1], size, 1.0, clip=True))
        boxes = three_boxes(whole_CYX.shape[-2:], size)
        return torch.stack([whole_CYX[..., y : y + size[0], x : x + size[1]] for y, x in boxes])

    def _resize(self, image_CYX: UInt8[Tensor, "*T 3 Y X"], size: tuple[int, int]) -> UInt8[Tensor, "*T 3 y x"]:
        if tuple(image_CYX.shape[-2:]) == size:
            return image_CYX
        if self.resizer == "pillow":
            kernel = Image.Resampling[self.interpolation.upper()]
            images = (frame.permute(1, 2, 0).numpy() for frame in image_CYX.reshape(-1, *image_CYX.shape[-3:]))
            resized = [np.array(Image.fromarray(frame).resize(size[::-1], kernel)) for frame in images]
            return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).reshape(*image_CYX.shape[:-2], *size)
        batch = image_CYX if image_CYX.ndim == 4 else image_CYX[None]
        done = interpolate(batch, size, mode=self.interpolation, antialias=self.antialias, align_corners=False)
        return done if image_CYX.ndim == 4 else done[0]

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


MULTISCALE = (1.0, 0.875, 0.75, 0.66)
"""Sides of multi-scale boxes as shares of the shorter side; width and height are at most one apart in this list."""
NEARLY = 3
"""Pixels by which a side may miss that of the view and still be taken for it."""
GRID = 4
"""Places of multi-scale boxes: corners and middle of a grid of so many steps."""


def multiscale_box(
    image: tuple[int, int],
    size: tuple[int, int],
    choose_shape: Callable[[int], int],
    choose_place: Callable[[int], int],
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box of one of the shapes of `multiscale_shapes` in a corner or the middle.

    Args:
        image: Rows and columns.
        size: Rows and columns of the view.
        choose_shape: Chooses a number below the given one.
        choose_place: The same; 0 to 4 = upper left, upper right, lower left, lower right, middle.
    """
    shapes = multiscale_shapes(image, size)
    height, width = shapes[choose_shape(len(shapes))]
    step_y, step_x = (image[0] - height) // GRID, (image[1] - width) // GRID
    y, x = ((0, 0), (0, GRID), (GRID, 0), (GRID, GRID), (GRID // 2, GRID // 2))[choose_place(5)]
    return y * step_y, x * step_x, height, width


def multiscale_shapes(image: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """The (height, width) of all multi-scale boxes."""
    sides = [int(min(image) * scale) for scale in MULTISCALE]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    near = [tuple(n if abs(s - n) < NEARLY else s for s, n in zip(pair, size, strict=True)) for pair in pairs]
    return [(height, width) for height, width in near]


def three_boxes(image: tuple[int, ...], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Top and left of the first, last and middle box along the side that is longer than the view's."""
    spare_y, spare_x = image[0] - size[0], image[1] - size[1]
    step_y, step_x = (spare_y // 2, 0) if spare_y > spare_x else (0, spare_x // 2)
    return [(0, 0), (2 * step_y, 2 * step_x), (step_y, step_x)]


def covering_size(
    size: tuple[int, ...], wanted: tuple[int, int], crop_pct: float, *, clip: bool = False
) -> tuple[int, int]:
    """Size of an image of `size` scaled to just cover `wanted / crop_pct`, rounded as the official code does.

    PARITY: it cuts the longer side of an image to whole pixels, and rounds that of the frames of a clip.
    """
    rows, columns = int(wanted[0] / crop_pct), int(wanted[1] / crop_pct)
    height, width = size
    half = 0.5 if clip else 0.0
    if columns * height >= rows * width:
        return max(rows, int(columns * height / width + half)), columns
    return rows, max(columns, int(rows * width / height + half))


def target_pixels(batch: dict[str, Any]) -> UInt8[Tensor, "B 3 Y X"]:
    """The copy of the crop that a target looks at: its own where a batch of the loader has one, else the model's."""
    pixels_BCYX: Tensor = batch["target_image"] if "target_image" in batch else batch["image"]
    return pixels_BCYX


def normalise(
    image_BCYX: UInt8[Tensor, "*B 3 Y X"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*B 3 Y X"]:
    """Bytes to numbers on whatever device they are: `(image / 255 - mean) / std`, per channel.

    The constants are filled in on the device instead of copied to it, since a copy would wait for the device.
    """

    def per_channel(values: list[float]) -> Tensor:
        return torch.cat([torch.full((1, 1, 1), v, device=image_BCYX.device) for v in values])

    scale = per_channel([1 / (255 * s) for s in std])
    shift = per_channel([-m / s for m, s in zip(mean, std, strict=True)])
    return image_BCYX.float().mul_(scale).add_(shift).to(dtype)  # in place: one new tensor instead of three
