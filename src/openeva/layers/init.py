"""How fresh weights are drawn.

Source: spec section 1.6 of EVA-01 and 4.3 of EVA-02.
"""

from torch import Tensor, nn


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
