"""The features of any frozen backbone as the target: CLIP, EVA-CLIP, DINO, a ConvNet, an openeva checkpoint.

view of the crop -> teacher (no gradient, reduced precision) -> patches -> student's grid -> fp32 -> [standardised per channel]
with `cache`: training images -> the same, once per image and flip -> memory-mapped fp16 file -> `lookup`

Paper: EVA section 2.1 (the target is not normalised). Source: spec sections 2.1 to 2.3. Difference: bf16 where the hardware has it,
where the official code uses fp16. Standardising each channel and caching are ours, for teachers whose channels differ much in scale
and for fixed crops.
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from openeva.backbones.base import Backbone
from openeva.config import Backbone as BackboneField
from openeva.config import ComponentConfig
from openeva.engine.precision import PrecisionName, resolve_precision
from openeva.losses.cosine import negative_cosine
from openeva.targets.base import Target, View

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Config(ComponentConfig):
    """Predict a frozen teacher's features."""

    name: str = "features"
    teacher: BackboneField = Field(
        description="any backbone; whether its patches are projected is the teacher's own key"
    )
    layer: int | None = Field(
        None, description="layer of the teacher (negative from the end); default: the teacher's own output"
    )
    image_size: int | None = Field(None, description="pixels of the teacher's input; default: the teacher's own")
    resize: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="how features come to the student's grid where the teacher's differs; antialiased"
    )
    standardise: bool = Field(
        False, description="true = each channel gets mean 0 and deviation 1 over the training images"
    )
    standardise_images: int = Field(512, ge=1, description="images that the statistics are estimated on")
    cache: bool = Field(False, description="true = compute each training image's features once; needs fixed crops")
    precision: PrecisionName = Field("auto", description="of the teacher's forward pass")

    def build(self, grid: tuple[int, int]) -> "FeatureTarget":
        """Make the target for a student with this patch grid.

        Raises:
            WeightsError: The teacher's weights cannot be reached.
            ValueError: The teacher has no such layer or cannot take this image size.
        """
        return FeatureTarget(self, grid)


class FeatureTarget(Target):
    """A frozen teacher.

    Attributes:
        teacher: The backbone, always in eval mode.
        grid: The student's patch grid, to which features are resized.
        cached: True once `prepare` has made the cache, from when on `lookup` replaces the teacher on training images.
        needs_preparation: True where `prepare` must see the training images before the first use.
    """

    mean_V: Tensor
    std_V: Tensor

    def __init__(self, config: Config, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        teacher = config.teacher
        if config.image_size is not None:
            teacher = type(teacher).model_validate({**teacher.model_dump(), "image_size": config.image_size})
        self.teacher: Backbone = teacher.build().eval().requires_grad_(False)
        self.view = View(self.teacher.image_size, self.teacher.normalisation)
        self.layer = None if config.layer is None else config.layer % self.teacher.num_layers
        self.width = self._width()
        self.identity = self.teacher.identity + ("" if self.layer is None else f", layer {self.layer}")
        self.identity += ", standardised" if config.standardise else ""
        self.needs_preparation = config.standardise or config.cache
        self.cached = False
        self.register_buffer("mean_V", torch.zeros(self.width))
        self.register_buffer("std_V", torch.ones(self.width))

    def _width(self) -> int:
        if self.layer is None:
            return self.teacher.width
        with torch.inference_mode():
            return (
                self.teacher(torch.zeros(1, 3, *self.view.image_size), layers=(self.layer,))
                .pyramid[self.layer]
                .shape[1]
            )

    def train(self, mode: bool = True) -> "FeatureTarget":
        """Training mode of everything but the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, image_BCYX: Shaped[Tensor, "B C Y X"]) -> Float[Tensor, "B N V"]:
        """Features of all patches of the student's grid, in fp32."""
        return self._standardise(self._features(image_BCYX))

    @torch.no_grad()
    def _features(self, image_BCYX: Shaped[Tensor, "B C Y X"]) -> Float[Tensor, "B N V"]:
        device = image_BCYX.device
        precision = resolve_precision(self.config.precision, device)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            features = self.teacher(image_BCYX, layers=() if self.layer is None else (self.layer,))
        if self.layer is None:
            map_BVyx = features.patches.float().transpose(1, 2).unflatten(2, features.grid)
        else:
            map_BVyx = features.pyramid[self.layer].float()
        if map_BVyx.shape[2:] != self.grid:
            map_BVyx = F.interpolate(map_BVyx, self.grid, mode=self.config.resize, antialias=True, align_corners=False)
        return map_BVyx.flatten(2).transpose(1, 2)

    def _standardise(self, target_BNV: Float[Tensor, "B N V"]) -> Float[Tensor, "B N V"]:
        return (target_BNV - self.mean_V) / self.std_V if self.config.standardise else target_BNV

    def loss(
        self,
        predicted_MV: Float[Tensor, "M V"],
        target_MV: Float[Tensor, "M V"],
        weight_M: Float[Tensor, "M"] | None = None,
    ) -> Float[Tensor, ""]:
        """Minus the mean cosine over the masked patches of the batch, in fp32."""
        return negative_cosine(predicted_MV, target_MV, weight_M)

    def flops(self) -> float:
        """FLOPs of the teacher for one image; 0 when its features are cached."""
        return 0.0 if self.cached else self.teacher.flops()
