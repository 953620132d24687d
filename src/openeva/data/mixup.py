"""Mixup and CutMix: every image of a batch is mixed with another, and its label with that one's.

normalised images[B,C,Y,X] or clips[B,T,C,Y,X], labels[B] -> lambda ~ Beta(alpha, alpha) -> mixed images, soft
targets[B,V], on the device

One lambda and one box hold for the whole batch, and all frames of its clips. The partner of image i is image B-1-i, so
that no index travels to the device, or one of a random order. Chance comes from torch's global CPU generator, which
checkpoints hold.

Paper: Zhang et al. (arXiv 1710.09412); Yun et al., CutMix (arXiv 1905.04899).
Source: spec section 4 (timm 0.5.4, batch mode): the half-extent of a box is `side // 2` in both directions, where the
installed timm takes `(side + 1) // 2` in one of them; lambda is the share of the area that really stays. Clips: spec
section 3.6 of video, where partners come in a random order.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor
from torch.distributions import Beta

from openeva.config import Config


class MixupConfig(Config):
    """How images of a batch are mixed; nothing is, where both alphas are 0.

    Attributes:
        mixup: Alpha of mixup (weighted mean of two images); 0 = off.
        cutmix: Alpha of CutMix (a box of the other image); 0 = off.
        prob: Probability that a batch is mixed at all.
        switch_prob: Where both are on, the probability of CutMix.
        partners: "reversed" = the batch from its end, of an even size; "shuffled" = at random, so that an image may
            meet itself.
    """

    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    prob: float = Field(1.0, ge=0, le=1)
    switch_prob: float = Field(0.5, ge=0, le=1)
    partners: Literal["reversed", "shuffled"] = "reversed"

    @property
    def active(self) -> bool:
        """Whether any batch can be mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def build(self) -> "Mixup":
        """Make the callable."""
        return Mixup(self)


class Mixup:
    """Mixes batches; see the module's text."""

    def __init__(self, config: MixupConfig) -> None:
        self.config = config

    def __call__(
        self,
        image_BCYX: Float[Tensor, "B *T C Y X"],
        label_B: Int[Tensor, "B"],
        num_classes: int,
        smoothing: float = 0.0,
    ) -> tuple[Float[Tensor, "B *T C Y X"], Float[Tensor, "B V"]]:
        """Mixed images and their targets (float32, rows sum to 1).

        Args:
            image_BCYX: Normalised images or clips; left as they are.
            label_B: Class of each image, all in `[0, num_classes)`.
            num_classes: V.
            smoothing: Share of a target that is spread evenly over all classes.

        Raises:
            ValueError: An odd number of images is to be mixed.
        """
        share, order_B = 1.0, None  # of an image itself
        if self.config.active:
            self.check(len(image_BCYX))
            if self.config.partners == "shuffled":
                order_B = torch.randperm(len(image_BCYX)).to(label_B.device, non_blocking=True)
            image_BCYX, share = self._mix(image_BCYX, order_B)
        return image_BCYX, mixed_target(label_B, num_classes, share=share, smoothing=smoothing, order_B=order_B)

    def check(self, num_images: int) -> None:
        """Whether a batch of that many images can be mixed.

        Raises:
            ValueError: It cannot: their number is odd.
        """
        if self.config.active and num_images < 2:
            raise ValueError("mixup and cutmix mix the images of a batch, and there is one: raise run.micro_batch")
        if self.config.active and num_images % 2 and self.config.partners == "reversed":
            raise ValueError(
                f"mixup and cutmix pair the images of a batch, and {num_images} is odd: choose an even"
                " micro-batch (run.batch_size over processes, or run.micro_batch), set task.mixup.partners=shuffled, or"
                " set both to 0"
            )

    def _mix(
        self, image_BCYX: Float[Tensor, "B *T C Y X"], order_B: Int[Tensor, "B"] | None
    ) -> tuple[Float[Tensor, "B *T C Y X"], float]:
        config = self.config
        if _chance() >= config.prob:
            return image_BCYX, 1.0
        cut = config.cutmix > 0 and (config.mixup == 0 or _chance() < config.switch_prob)
        alpha = config.cutmix if cut else config.mixup
        share = float(Beta(alpha, alpha).sample())
        if not cut:
            return torch.lerp(partners(image_BCYX, order_B), image_BCYX, share), share
        height, width = image_BCYX.shape[-2:]
        return cut_and_paste(image_BCYX, partners(image_BCYX, order_B), cutmix_box(height, width, share))


def partners(batch: Shaped[Tensor, "B *rest"], order_B: Int[Tensor, "B"] | None) -> Shaped[Tensor, "B *rest"]:
    """What each sample of a batch is mixed with."""
    return batch.flip(0) if order_B is None else batch[order_B]


def cut_and_paste(
    image_BCYX: Float[Tensor, "B *T C Y X"], other_BCYX: Float[Tensor, "B *T C Y X"], box: tuple[int, int, int, int]
) -> tuple[Float[Tensor, "B *T C Y X"], float]:
    """Images with a box (top, bottom, left, right) of others, and the share of the area that stays."""
    top, bottom, left, right = box
    mixed_BCYX = image_BCYX.clone()
    mixed_BCYX[..., top:bottom, left:right] = other_BCYX[..., top:bottom, left:right]
    height, width = image_BCYX.shape[-2:]
    return mixed_BCYX, 1 - (bottom - top) * (right - left) / (height * width)


def cutmix_box(
    height: int, width: int, share: float, centre: tuple[int, int] | None = None
) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box with a uniform centre whose sides are `sqrt(1 - share)` of the image's.

    What lies outside of the image is cut off. The centre (row, column) may be given.
    """
    ratio = math.sqrt(1 - share)
    half_y, half_x = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = centre or (int(torch.randint(height, ())), int(torch.randint(width, ())))
    return max(y - half_y, 0), min(y + half_y, height), max(x - half_x, 0), min(x + half_x, width)


def mixed_target(
    label_B: Int[Tensor, "B"],
    num_classes: int,
    *,
    share: float = 1.0,
    smoothing: float = 0.0,
    order_B: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B V"]:
    """Smoothed one-hot rows, mixed with those of the reversed batch, or of the batch in the order `order_B`."""
    off = smoothing / num_classes
    target_BV = torch.full((len(label_B), num_classes), off, device=label_B.device)
    target_BV.scatter_(1, label_B[:, None].long(), 1 - smoothing + off)
    return target_BV if share == 1 else share * target_BV + (1 - share) * partners(target_BV, order_B)


def _chance() -> float:
    """Uniform in [0, 1), from the generator that checkpoints hold."""
    return float(torch.rand(()))
