"""LayerNorm that always computes in fp32.

Source: the official forced-fp32 LayerNorm: input, weight and bias are cast to fp32, the result back to the input's
dtype.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Normalisation over the last axis in fp32 whatever the input's dtype; the result has the input's dtype."""

    def forward(self, x_D: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes D"]:
        """Normalise the last axis."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x_D.float(), self.normalized_shape, weight, bias, self.eps).to(x_D.dtype)
