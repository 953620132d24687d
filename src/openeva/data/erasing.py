"""Random erasing: a box of an image is replaced by noise.

normalised images[B,C,Y,X] -> per image a box of 2-33 % of its area -> standard normal noise in it, on the device

Boxes come from torch's global CPU generator, noise from the device's; checkpoints hold both.

Paper: Zhong et al. (arXiv 1708.04896). Source: spec section 4 (timm 0.5.4, mode "pixel", one box, ten tries).
"""

import math

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from openeva.config import Config

_TRIES = 10


class ErasingConfig(Config):
    """How boxes are erased; called with images, it does so.

    Attributes:
        prob: Probability that an image loses a box; 0 = off.
        area: Share of the image's area, (least, largest).
        ratio: Height / width of the box, (least, largest).
    """

    prob: float = Field(0.0, ge=0, le=1)
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    @model_validator(mode="after")
    def _check(self) -> "ErasingConfig":
        if not 0 < self.area[0] <= self.area[1] < 1:
            raise ValueError(f"area is (least, largest) with 0 < least <= largest < 1, not {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is (least, largest) with 0 < least <= largest, not {self.ratio}")
        return self

    def __call__(self, image_BCYX: Float[Tensor, "B *T C Y X"]) -> Float[Tensor, "B *T C Y X"]:
        """A copy of the normalised images with boxes of noise; the images themselves where nothing is erased."""
        channels, height, width = image_BCYX.shape[-3:]
        chosen = (torch.rand(len(image_BCYX)) < self.prob).nonzero()[:, 0].tolist()
        if not chosen:
            return image_BCYX
        image_BCYX = image_BCYX.clone()
        for number in chosen:
            top, left, h, w = self._box(height, width)
            noise_CYX = torch.randn(channels, h, w, device=image_BCYX.device, dtype=image_BCYX.dtype)
            image_BCYX[number, :, top : top + h, left : left + w] = noise_CYX
        return image_BCYX

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width; an empty box where no try fits into the image."""
        least, largest = (math.log(value) for value in self.ratio)
        for u, v in torch.rand(_TRIES, 2, dtype=torch.float64).tolist():
            area = (self.area[0] + u * (self.area[1] - self.area[0])) * height * width
            ratio = math.exp(least + v * (largest - least))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                return int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ())), h, w
        return 0, 0, 0, 0
