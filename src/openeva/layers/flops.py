"""FLOPs of a forward pass by counting the operators that it runs, on shapes alone: nothing is computed.

module, input shape -> fake tensors -> torch's operator counter -> FLOPs
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

Output = TypeVar("Output")


def trace_shapes(forward: Callable[[Tensor], Output], shape: tuple[int, ...]) -> tuple[Output, float]:
    """Output (shapes without values) and FLOPs (2 per multiply-add) of `forward` for a float input of this shape.

    Matrix products, convolutions and attention count, elementwise operators and norms do not. Weights must lie on the
    CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = forward(torch.empty(shape))
    return output, float(counter.get_total_flops())
