"""The two kinds of MLP inside a block.

GELU:   x[B,S,D] -> linear -> GELU -> norm? -> linear -> dropout
SwiGLU: x[B,S,D] -> linear to gate and value -> silu(gate) * value -> norm? -> linear -> dropout

Paper: EVA-02 (arXiv 2303.11331) section 2.1. Source: spec sections 1.2 of EVA-01 and 4.1 of EVA-02. The norm in the
middle is EVA-02's sub-LN (official name `ffn_ln`). Deliberate difference: gate and value are one matrix, gate rows
first, also where the official files have two (names and layout are translated in `checkpoints/`).
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openeva.layers.norm import LayerNorm


class Mlp(nn.Module):
    """Linear, exact GELU, linear, dropout.

    Args:
        width: D.
        hidden: F.
        dropout: Probability on the output.
        norm_eps: Epsilon of a norm in front of the second linear layer; None for no norm.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, *, norm_eps: float | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.Identity() if norm_eps is None else LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def last(self) -> nn.Linear:
        """The linear layer whose output joins the residual stream."""
        return self.fc2

    def forward(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Transform each token."""
        return self.dropout(self.fc2(self.norm(F.gelu(self.fc1(x_BSD)))))


class SwiGlu(nn.Module):
    """Gate and value in one linear layer, their product, linear, dropout.

    Args:
        width: D.
        hidden: F.
        dropout: Probability on the output.
        norm_eps: Epsilon of a norm in front of the second linear layer; None for no norm.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, *, norm_eps: float | None = None) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.norm = nn.Identity() if norm_eps is None else LayerNorm(hidden, eps=norm_eps)
        self.w3 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def last(self) -> nn.Linear:
        """The linear layer whose output joins the residual stream."""
        return self.w3

    def forward(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Transform each token."""
        gate_BSF, value_BSF = self.w12(x_BSD).chunk(2, dim=-1)
        return self.dropout(self.w3(self.norm(F.silu(gate_BSF) * value_BSF)))
