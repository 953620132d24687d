"""A backbone with a classification head.

image[B,3,Y,X] -> backbone -> pooled[B,D] -> norm -> linear -> logits[B,V]

Paper: EVA section 3.1. Source: spec section 1.4: "mean" pools the patch tokens, cls excluded, in front of the norm (the
backbone then has no final norm of its own); "cls" takes the cls token after the backbone's final norm.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.layers.norm import LayerNorm

Pooling = Literal["mean", "cls"]

HEAD_STD = 0.02
HEAD_SCALE = 0.001
"""Fresh classifiers start close to zero: normal with `HEAD_STD`, times `HEAD_SCALE`."""
PROBE_STD = 0.01
"""Of the weights of a linear probe, which stand behind a batch norm and are not scaled."""


class ImageClassifier(nn.Module):
    """Backbone, pooling and classifier; what a classification run trains.

    Args:
        backbone: Any backbone. For mean pooling as the official models do it, one without a final norm.
        num_classes: V.
        pooling: "mean" of the patch tokens, then `fc_norm`; or the "cls" token.
        batch_norm: Put a batch norm without affine parameters in front of the linear layer (the linear probe's head).
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, pooling: Pooling = "mean", batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.pooling = num_classes, pooling
        self.fc_norm = LayerNorm(backbone.width, eps=1e-6) if pooling == "mean" else nn.Identity()
        linear = nn.Linear(backbone.width, num_classes)
        self.classifier: nn.Module = linear
        if batch_norm:
            self.classifier = nn.Sequential(nn.BatchNorm1d(backbone.width, affine=False, eps=1e-6), linear)
        self.init_head()

    @torch.no_grad()
    def init_head(self) -> None:
        """Draw the classifier's weights anew (spec section 1.6)."""
        probe = isinstance(self.classifier, nn.Sequential)
        linear = self.classifier[1] if isinstance(self.classifier, nn.Sequential) else self.classifier
        nn.init.trunc_normal_(linear.weight, std=PROBE_STD if probe else HEAD_STD)
        linear.weight.mul_(1.0 if probe else HEAD_SCALE)
        nn.init.zeros_(linear.bias)

    def forward(self, image_BCYX: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B V"]:
        """Logits of normalised images."""
        return self.classifier(self.pool(image_BCYX))

    def pool(self, image_BCYX: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B D"]:
        """The vector that the classifier sees."""
        features = self.backbone(image_BCYX)
        if self.pooling == "mean":
            return self.fc_norm(features.patches.mean(dim=1))
        if features.cls is None:
            raise ValueError(f"{type(self.backbone).__name__} has no cls token; pool by mean")
        return features.cls

    def patches(self, image_BCYX: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        """One vector per patch, each normalised as the pooled one is."""
        return self.fc_norm(self.backbone(image_BCYX).patches)
