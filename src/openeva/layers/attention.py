"""Multi-head self-attention through `scaled_dot_product_attention`.

x[B,S,D] -> one fused projection -> q, k, v[B,H,S,K] -> q and k rotated? -> attention -> merged heads -> norm? ->
projection[B,S,D]

Paper: EVA section 2.1 (q and v have biases, k has none), EVA-02 section 2.1 (RoPE). Source: spec sections 1.2 and 1.4
of EVA-01, 1.3 and 4 of EVA-02. The norm is that of EVA02-CLIP (official name `inner_attn_ln`). Deliberate difference:
the official code computes the logits in fp32 by a cast. The fused kernels accumulate them in fp32 whatever the input's
dtype; only reduced-precision training on CPUs rounds them to that dtype first (see `prefers_composed`), before a
softmax in fp32.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from openeva.layers.norm import LayerNorm
from openeva.layers.relative_position import Place, RelativePosition
from openeva.layers.rope import rotate

LONGEST_COMPOSED = 1024
"""Above so many tokens the logits of a batch would take too much memory."""

QkvBias = Literal["qv", "full", "none"]


class Attention(nn.Module):
    """Self-attention with an optional additive bias.

    Args:
        width: D.
        num_heads: H.
        head_width: K; D / H when None.
        qkv_bias: "qv" (EVA-g: q and v only), "full" (EVA-L: one bias of length 3HK) or "none".
        dropout: Probability on attention weights.
        position_bias: This block's own relative position bias, or None.
        norm_eps: Epsilon of a norm in front of the output projection; None for no norm.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_width: int | None = None,
        qkv_bias: QkvBias = "qv",
        dropout: float = 0.0,
        position_bias: RelativePosition | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        inner = num_heads * (head_width or width // num_heads)
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias == "full")
        self.q_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias == "qv" else None
        self.position_bias = position_bias
        self.norm = nn.Identity() if norm_eps is None else LayerNorm(inner, eps=norm_eps)
        self.proj = nn.Linear(inner, width)

    def forward(
        self,
        x_BSD: Float[Tensor, "B S D"],
        bias: Float[Tensor, "H S S"] | Float[Tensor, "B H S S"] | None = None,
        visible_BS: Bool[Tensor, "B S"] | None = None,
        place: Place | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend.

        Args:
            x_BSD: Tokens.
            bias: Added to the logits (the model's shared relative position bias).
            visible_BS: True where a token may be attended to; None for all.
            place: Where the tokens stand, for RoPE and this block's own bias; None for all patches of the grid that it
                was built for, without RoPE.
        """
        qkv_BSF = self._project(x_BSD)
        if place is None or place.rope is None:
            q_BHSK, k_BHSK, v_BHSK = qkv_BSF.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            qkv_BSHK = qkv_BSF.unflatten(-1, (3 * self.num_heads, -1))
            qk_BSHK = rotate(qkv_BSHK[:, :, : 2 * self.num_heads], place.rope)
            q_BHSK, k_BHSK = qk_BSHK.transpose(1, 2).chunk(2, dim=1)
            v_BHSK = qkv_BSHK[:, :, 2 * self.num_heads :].transpose(1, 2)
        mask = self._logit_mask(q_BHSK, bias, visible_BS, place)
        dropout = self.dropout if self.training else 0.0
        if mask is None and dropout == 0.0 and prefers_composed(q_BHSK):
            out_BHSK = composed_attention(q_BHSK, k_BHSK, v_BHSK)
        else:
            out_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, dropout_p=dropout)
        return self.proj(self.norm(out_BHSK.transpose(1, 2).flatten(2)))

    def _project(self, x_BSD: Tensor) -> Float[Tensor, "B S F"]:
        """q, k and v of all heads in one matrix product, or in more where an adapter wraps the layer."""
        if type(self.qkv) is nn.Linear:
            return F.linear(x_BSD, self.qkv.weight, self._bias())
        qkv_BSF = self.qkv(x_BSD)  # with the layer's own bias, if it has one
        bias = None if self.q_bias is None else self._bias()
        return qkv_BSF if bias is None else qkv_BSF + bias.to(qkv_BSF.dtype)

    def _bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def _logit_mask(
        self, q_BHSK: Tensor, bias: Tensor | None, visible_BS: Tensor | None, place: Place | None
    ) -> Float[Tensor, "_ H S S"] | Bool[Tensor, "B 1 1 S"] | None:
        if self.position_bias is not None:
            own = self.position_bias(place)
            bias = own if bias is None else own + bias
        visible_B11S = None if visible_BS is None else visible_BS[:, None, None, :]
        if bias is None:
            return visible_B11S
        bias_BHSS = (bias if bias.ndim == 4 else bias[None]).to(q_BHSK.dtype)
        return bias_BHSS if visible_B11S is None else bias_BHSS.masked_fill(~visible_B11S, float("-inf"))


def composed_attention(
    q_BHSK: Float[Tensor, "B H S K"],
    k_BHSK: Float[Tensor, "B H S K"],
    v_BHSK: Float[Tensor, "B H S K"],
    bias_SS: Float[Tensor, "S S"] | None = None,
) -> Float[Tensor, "B H S K"]:
    """Attention as two matrix products and a softmax in fp32; a bias without gradient is added to the logits."""
    logits_BHSS = (q_BHSK * q_BHSK.shape[-1] ** -0.5) @ k_BHSK.transpose(-2, -1)
    if bias_SS is not None:
        logits_BHSS = logits_BHSS.add_(bias_SS.to(logits_BHSS.dtype))
    return logits_BHSS.softmax(dim=-1, dtype=torch.float32).to(v_BHSK.dtype) @ v_BHSK


def prefers_composed(q_BHSK: Tensor) -> bool:
    """Whether to train through `composed_attention`: torch's fused kernel for CPUs has a slow backward pass in bf16.

    Measured at 197 tokens on two cores with AMX: fused 4 ms forward and 23 to 29 ms backward, composed 6 and 9 to 13.
    In fp32 and without gradients the fused kernel is the faster one.
    """
    reduced = q_BHSK.dtype in {torch.bfloat16, torch.float16}
    return q_BHSK.device.type == "cpu" and reduced and q_BHSK.requires_grad and q_BHSK.shape[2] <= LONGEST_COMPOSED
