"""How fresh weights are drawn.

Source: spec section 1.6 of EVA-01 and 4.3 of EVA-02.
"""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from openeva.layers.block import Block
from openeva.layers.mlp import SwiGlu


def truncated_normal_(tensor: Tensor, std: float, cut: float | None) -> None:
    """Fill with normal values, cut at `cut` standard deviations; None for no cut that could be noticed."""
    limit = 2.0 if cut is None else cut * std  # PARITY: the official limit of 2 is absolute
    nn.init.trunc_normal_(tensor, std=std, a=-limit, b=limit)


def xavier_normal_(layer: nn.Linear, factors: tuple[float, ...]) -> None:
    """Fill a linear layer that stands for one or several matrices, stacked, with Xavier-normal values; biases are 0.

    Args:
        layer: Its rows are divided equally among the matrices.
        factors: One per matrix, multiplied into its values.
    """
    for matrix, factor in zip(layer.weight.chunk(len(factors)), factors, strict=True):
        nn.init.xavier_normal_(matrix)
        matrix.mul_(factor)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def xavier_uniform_(module: nn.Module) -> None:
    """Fill all linear layers of a module with Xavier-uniform values, each matrix as it is stored; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def xavier_normal_blocks_(blocks: Sequence[Block], *, split: bool) -> None:
    """Fill the linear layers of all blocks as EVA-02's pre-training does: each matrix as the official files store it.

    Args:
        blocks: Of the whole depth, which scales what sub-LN follows.
        split: They have sub-LN, and are stored with q, k and v, gate and value apart.
    """
    factor = math.log(2 * len(blocks)) ** 0.5 if split else 1.0
    for block in blocks:
        xavier_normal_(block.attn.qkv, (1.0, 1.0, factor) if split else (1.0,))
        xavier_normal_(block.attn.proj, (factor,))
        gated = isinstance(block.mlp, SwiGlu)
        first = block.mlp.w12 if isinstance(block.mlp, SwiGlu) else block.mlp.fc1
        xavier_normal_(first, (factor, factor) if split and gated else (factor,))
        xavier_normal_(block.mlp.last, (factor,))


def init_patches_(kernel: nn.Conv2d | nn.Conv3d) -> None:
    """Fill the patch kernel, seen as one matrix, with Xavier-uniform values; its bias stays PyTorch's."""
    kernel.reset_parameters()
    nn.init.xavier_uniform_(kernel.weight.flatten(1))


def init_tokens_(tokens: Iterable[Tensor | None], std: float, cut: float | None) -> None:
    """Fill the tokens and tables that are learned; fixed ones stay."""
    for token in tokens:
        if isinstance(token, nn.Parameter):
            truncated_normal_(token, std, cut)
