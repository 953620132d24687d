"""A backbone with a classification head.

image[B,3,Y,X] or clip[B,T,3,Y,X] -> backbone -> pooled[B,D] -> norm -> linear -> logits[B,V]
several views of each video[B,W,T,3,Y,X] -> logits of each -> `over_views`: log of the mean probability[B,V]

Paper: EVA section 3.1. Source: spec section 1.4: "mean" pools the patch tokens, cls excluded, in front of the norm (the
backbone then has no final norm of its own); "cls" takes the cls token after the backbone's final norm. "attention" is
ours: a learned query looks at the patch tokens, the usual attentive probe of masked pre-training.
"""

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.engine.distributed import mean_over_processes
from openeva.layers.norm import LayerNorm

Pooling = Literal["mean", "cls", "attention"]

HEAD_STD = 0.02
HEAD_SCALE = 0.001
"""The official fresh classifiers start close to zero: normal with `HEAD_STD`, times `HEAD_SCALE`."""
PROBE_STD = 0.01
"""Of the weights of a linear probe, which stand behind a batch norm and are not scaled."""
QUERY_HEAD_WIDTH = 64
"""Channels per head of the attention pooling."""


def over_views(classify: Callable[[Tensor], Tensor], image: Shaped[Tensor, "B *views C Y X"]) -> Float[Tensor, "B V"]:
    """Logits of a batch; of videos in several views `[B, W, T, C, Y, X]`, those whose softmax is the mean over views.

    The views pass one after the other, so that a video needs no more memory than a clip.

    Source: spec section 3.5 of video: probabilities are added, not logits.
    """
    if image.ndim < 6:
        return classify(image)
    return mean_of_views(torch.stack([classify(view).float() for view in image.unbind(1)]))


def mean_of_views(logits_WBV: Float[Tensor, "W *B V"]) -> Float[Tensor, "*B V"]:
    """Log of the mean probability over views; finite where a view is sure of something else."""
    return logits_WBV.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits_WBV))


class AttentionPooling(nn.Module):
    """One learned query that attends to the patch tokens; what it gathers stands for the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        num_heads = max(1, width // QUERY_HEAD_WIDTH)
        while width % num_heads:
            num_heads -= 1
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        nn.init.trunc_normal_(self.query, std=HEAD_STD)

    def forward(self, patches_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        """Pool."""
        query_B1D = self.query.to(patches_BND.dtype).expand(patches_BND.shape[0], -1, -1)
        pooled_B1D, _ = self.attn(query_B1D, patches_BND, patches_BND, need_weights=False)
        return pooled_B1D[:, 0]


class ImageClassifier(nn.Module):
    """Backbone, pooling and classifier; what a classification run trains.

    A mask token of the backbone is taken off: nothing here is ever hidden, and data-parallel training waits for the
    gradient of every parameter.

    Args:
        backbone: Any backbone. For mean pooling as the official models do it, one without a final norm.
        num_classes: V.
        pooling: "mean" of the patch tokens, then `fc_norm`; the "cls" token; or "attention" of a learned query over the
            patch tokens, then `fc_norm`.
        batch_norm: Put a batch norm without affine parameters in front of the linear layer (the linear probe's head).
        head_scale: Weights of a fresh classifier have the deviation 0.02 times this; a linear probe's have their own.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        pooling: Pooling = "mean",
        batch_norm: bool = False,
        head_scale: float = HEAD_SCALE,
    ) -> None:
        super().__init__()
        if isinstance(getattr(backbone, "mask_token", None), nn.Parameter):
            backbone.register_parameter("mask_token", None)
        self.backbone = backbone
        self.num_classes, self.pooling = num_classes, pooling
        if pooling == "attention":
            self.attention_pool = AttentionPooling(backbone.width)
        self.fc_norm = nn.Identity() if pooling == "cls" else LayerNorm(backbone.width, eps=1e-6)
        linear = nn.Linear(backbone.width, num_classes)
        self.classifier: nn.Module = linear
        if batch_norm:
            self.classifier = nn.Sequential(nn.BatchNorm1d(backbone.width, affine=False, eps=1e-6), linear)
        self._init_head(head_scale)

    @torch.no_grad()
    def _init_head(self, scale: float) -> None:
        """Draw the classifier's weights (spec section 1.6)."""
        probe = isinstance(self.classifier, nn.Sequential)
        linear = cast(
            "nn.Linear", self.classifier[1] if isinstance(self.classifier, nn.Sequential) else self.classifier
        )
        nn.init.trunc_normal_(linear.weight, std=PROBE_STD if probe else HEAD_STD)
        linear.weight.mul_(1.0 if probe else scale)
        nn.init.zeros_(linear.bias)

    def forward(self, image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"]) -> Float[Tensor, "B V"]:
        """Logits of normalised images or clips."""
        return self.classifier(self.pool(image_BCYX))

    def pool(self, image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"]) -> Float[Tensor, "B D"]:
        """The vector that the classifier sees."""
        features = self.backbone(image_BCYX)
        if self.pooling == "mean":
            return self.fc_norm(features.patches.mean(dim=1))
        if self.pooling == "attention":
            return self.fc_norm(self.attention_pool(features.patches))
        if features.cls is None:
            raise ValueError(f"{type(self.backbone).__name__} has no cls token; pool by mean")
        return features.cls

    @torch.no_grad()
    def share_batch_norm_statistics(self) -> None:
        """Each process trains with the statistics of its own images; what is measured and saved is their mean."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None:
                for statistic in (module.running_mean, cast("Tensor", module.running_var)):
                    statistic.copy_(mean_over_processes(statistic.clone()))

    def patches(self, image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"]) -> Float[Tensor, "B N D"]:
        """One vector per patch, each normalised as the pooled one is."""
        return self.fc_norm(self.backbone(image_BCYX).patches)
