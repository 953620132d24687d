"""One transformer block: attention and MLP with residual connections.

pre-norm:  x + drop(gamma_1 * attention(norm1(x))), then x + drop(gamma_2 * mlp(norm2(x)))
post-norm: x + drop(gamma_1 * norm1(attention(x))), then x + drop(gamma_2 * norm2(mlp(x)))

Source: spec section 1.2. Stochastic depth is per sample; survivors are divided by the keep probability.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from openeva.layers.attention import Attention
from openeva.layers.mlp import Mlp, SwiGlu
from openeva.layers.norm import LayerNorm
from openeva.layers.relative_position import Place

NormOrder = Literal["pre", "post"]


class Block(nn.Module):
    """Attention and MLP with residual connections.

    Args:
        attention: The attention module.
        mlp: The MLP; given from outside so that variants need no second block.
        width: D.
        norm_eps: Epsilon of both norms.
        norm_order: "pre" or "post" (the branch's output is normalised).
        layer_scale: Initial value of the per-channel factors `gamma_1`, `gamma_2`; None leaves them out.
        drop_path: Probability that a sample skips a branch.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: Mlp | SwiGlu,
        *,
        width: int,
        norm_eps: float = 1e-6,
        norm_order: NormOrder = "pre",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_order = norm_order
        self.norm1 = LayerNorm(width, eps=norm_eps)
        self.attn = attention
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = mlp
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
        self.drop_path = StochasticDepth(drop_path, mode="row") if drop_path else nn.Identity()

    def forward(
        self,
        x_BSD: Float[Tensor, "B S D"],
        bias: Float[Tensor, "H S S"] | Float[Tensor, "B H S S"] | None = None,
        visible_BS: Bool[Tensor, "B S"] | None = None,
        place: Place | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Transform tokens; see `Attention.forward` for the optional arguments."""
        if self.norm_order == "pre":
            x_BSD = x_BSD + self._branch(self.attn(self.norm1(x_BSD), bias, visible_BS, place), self.gamma_1)
            return x_BSD + self._branch(self.mlp(self.norm2(x_BSD)), self.gamma_2)
        x_BSD = x_BSD + self._branch(self.norm1(self.attn(x_BSD, bias, visible_BS, place)), self.gamma_1)
        return x_BSD + self._branch(self.norm2(self.mlp(x_BSD)), self.gamma_2)

    def _branch(self, branch_BSD: Tensor, gamma_D: Tensor | None) -> Tensor:
        return self.drop_path(branch_BSD if gamma_D is None else gamma_D * branch_BSD)
