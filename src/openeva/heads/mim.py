"""A student whose encoder sees all patches, hidden ones as mask tokens, and a linear prediction head.

image[B,3,Y,X], mask[B,N] -> backbone -> patches[B,N,D] -> those asked for [M,D] -> linear -> predictions[M,V]

Paper: EVA section 2.1. Source: spec sections 1.3 and 1.6 of EVA-01, 4.3 of EVA-02.
"""

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.config import Config
from openeva.data.masking import MaskGenerator


class NoDecoder(Config):
    """Hidden patches go through the encoder as mask tokens; a linear layer predicts from its output."""

    name: Literal["none"] = "none"

    def build(self, backbone: Backbone, masking: MaskGenerator, predict_width: int) -> "MimStudent":
        """Make the student.

        Raises:
            ValueError: The backbone has no mask token.
        """
        if getattr(backbone, "mask_token", None) is None:
            raise ValueError(
                f"task.backbone: {type(backbone).__name__} has no mask token and cannot be pre-trained by this task"
            )
        return MimStudent(backbone, predict_width)


class MimStudent(nn.Module):
    """The part that learns: backbone and linear prediction head.

    Attributes:
        prediction_part: Name of the part that belongs to the target; another target needs a fresh one.
    """

    prediction_part = "head"

    def __init__(self, backbone: Backbone, predict_width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, predict_width)
        config = getattr(backbone, "config", None)
        if getattr(config, "init", None) == "xavier":  # as EVA-02's pre-training
            nn.init.xavier_normal_(self.head.weight)
        else:
            std = getattr(config, "init_std", 0.02)
            nn.init.trunc_normal_(self.head.weight, std=std, a=-std, b=std)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"],
        mask_BN: Bool[Tensor, "B N"],
        index_M: Int[Tensor, "M"],
    ) -> Float[Tensor, "M V"]:
        """Predictions at the patches `index_M` (of the flattened `[B * N]`) of images whose `mask_BN` is hidden."""
        patches_BND = self.backbone(image_BCYX, mask_BN).patches
        return self.head(patches_BND.flatten(0, 1).index_select(0, index_M))

    def blocks(self) -> list[nn.Module]:
        """Repeated layers: the units of sharding and of block-wise compilation."""
        return list(getattr(self.backbone, "blocks", []))

    def encoder_flops(self) -> float:
        """The backbone's share of `flops`."""
        return self.backbone.flops()

    def flops(self, num_masked: int) -> float:
        """FLOPs of one forward pass of one image of which `num_masked` patches are predicted."""
        return self.encoder_flops() + 2.0 * num_masked * self.head.in_features * self.head.out_features
