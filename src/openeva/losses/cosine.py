"""Negative cosine similarity between predicted and target vectors, the loss of feature regression.

Paper: EVA section 2.1. Source: spec section 2.3: a mean over all masked tokens of the batch, not per image, in fp32,
eps 1e-8.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-8
"""Smallest length that a vector is divided by; an all-zero vector has cosine 0 with everything."""


def negative_cosine(
    predicted_MV: Float[Tensor, "M V"], target_MV: Float[Tensor, "M V"], weight_M: Float[Tensor, "M"] | None = None
) -> Float[Tensor, ""]:
    """Minus the mean cosine of the rows, in -1 (same directions) to 1; both sides are taken to fp32 first.

    Args:
        predicted_MV: One prediction per masked token.
        target_MV: What it should point at; its length plays no part.
        weight_M: Weights of the rows in the mean; rows of weight 0 (padding) do not count. All 0 gives a loss of 0.
    """
    cosine_M = F.cosine_similarity(predicted_MV.float(), target_MV.float(), dim=-1, eps=EPSILON)
    if weight_M is None:
        return -cosine_M.mean()
    weight_M = weight_M.float()
    return -(cosine_M * weight_M).sum() / weight_M.sum().clamp_min(EPSILON)
