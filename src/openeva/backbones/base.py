"""The backbone contract: an image (and optionally a mask) in, `Features` out. A teacher is a frozen backbone.

A file in this folder holds one backbone: `class Config(ComponentConfig)` whose `build()` returns a `Backbone`.
"""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass
class Features:
    """What a backbone says about a batch of images.

    Attributes:
        pooled: One vector per image, `[B, D]`.
        patches: One vector per patch, raster order, `[B, N, D]` with `N = y * x`; of clips one raster after the other,
            `N = slots * y * x`.
        grid: `(y, x)`, rows and columns of the patch grid.
        pyramid: Requested intermediate layers, `layer index -> [B, D', y', x']`; of clips `[B, D', slots, y', x']`.
        cls: The cls token after the final norm, `[B, D]`; None where there is none.
        slots: Patches along the time axis; 1 for images.
    """

    pooled: Float[Tensor, "B D"]
    patches: Float[Tensor, "B N D"]
    grid: tuple[int, int]
    pyramid: dict[int, Float[Tensor, "B _ *grid"]] = field(default_factory=dict)
    cls: Float[Tensor, "B D"] | None = None
    slots: int = 1


@dataclass(frozen=True)
class Normalisation:
    """Per-channel statistics that a backbone wants subtracted and divided, for images scaled to 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CLIP_STATISTICS = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATISTICS = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_STATISTICS = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"clip": CLIP_STATISTICS, "imagenet": IMAGENET_STATISTICS, "half": HALF_STATISTICS}
"""By the names that recipes use."""


class Backbone(nn.Module):
    """An image encoder.

    Attributes:
        width: Channels of `Features.patches` and `Features.pooled`.
        stride: Pixels per patch side.
        num_layers: Number of layers that `layers` may ask for.
        image_size: `(height, width)` in pixels that it was built for.
        num_frames: Frames of the clips that it takes, `[B, T, C, Y, X]`; None = it takes images.
        normalisation: Statistics its input must be normalised with.
        identity: Says which weights these are and what is read off them (`"open_clip:ViT-L-14/openai"`, plus a digest
            of the file where there is one). Recorded in checkpoints; two backbones of the same identity, `image_size`
            and `normalisation` give the same features.
    """

    width: int
    stride: int
    num_layers: int
    image_size: tuple[int, int]
    normalisation: Normalisation
    identity: str
    num_frames: int | None = None

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"],
        mask_BN: Bool[Tensor, "B N"] | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Encode normalised images.

        Args:
            image_BCYX: Normalised images, or clips where `num_frames` says so.
            mask_BN: True where a patch is hidden from the encoder; only backbones with a mask token take it.
            layers: Layer indices (negative from the end) to return in `Features.pyramid`.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with several axes that must not decay."""
        return set()

    def flops(self) -> float:
        """FLOPs (2 per multiply-add) of one forward pass of one image of `image_size`, or of one clip."""
        raise NotImplementedError
