"""A source of captioned images: two coloured halves each, and two phrases that say which."""

import numpy as np
from PIL import Image

from openeva.data.sources.base import Sample, SourceConfig

COLOURS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "red": (220, 30, 30), "green": (20, 160, 40), "blue": (20, 40, 220),
    "yellow": (240, 220, 20),
}  # fmt: skip
PAIRS = [(left, right) for left in COLOURS for right in COLOURS]


class Config(SourceConfig):
    """Up to 36 images."""

    name: str = "e2e.pairs"
    num_images: int = len(PAIRS)
    size: int = 32
    captions: bool = True

    def build(self) -> "Pairs":
        """Make the source."""
        return Pairs(self.num_images, self.size, self.captions)


class Pairs:
    """See above."""

    num_classes = 0

    def __init__(self, num_images: int, size: int, captions: bool) -> None:
        self.num_images, self.size, self.has_captions = num_images, size, captions

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> Sample:
        """Image and captions."""
        left, right = PAIRS[index]
        image_YXC = np.empty((self.size, self.size, 3), np.uint8)
        image_YXC[:, : self.size // 2], image_YXC[:, self.size // 2 :] = COLOURS[left], COLOURS[right]
        captions = [f"{left} beside {right}", f"a picture, {left} on the left and {right} on the right"]
        return Sample(Image.fromarray(image_YXC), f"{left}_{right}", extra={"captions": captions})
