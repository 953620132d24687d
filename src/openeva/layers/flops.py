"""FLOPs of a forward pass by counting the operators that it runs, on shapes alone, and what a training step adds.

module, input shape -> fake tensors -> torch's operator counter -> FLOPs
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Torch's counter of FLOPs by operator, which in older versions (2.11) knows no attention on CPUs."""
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs by the shapes of the operator's arguments."""
    return int(sdpa_flop_count(query, key, value))


def trace_shapes(module: nn.Module, shape: tuple[int, ...]) -> tuple[Any, float]:
    """Output (shapes without values) and FLOPs (2 per multiply-add) of a module for a float input of this shape.

    Matrix products, convolutions and attention count, elementwise operators and norms do not. The weights must lie on
    the CPU.
    """
    weights = {name: weight.detach() for name, weight in (*module.named_parameters(), *module.named_buffers())}
    training, fused = module.training, torch.backends.mha.get_fastpath_enabled()
    module.eval()  # else batch norms would count this batch
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operator whose FLOPs torch does not know
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), flop_counter() as counter:
            output = functional_call(module, weights, (torch.empty(shape),))
    finally:
        module.train(training)
        torch.backends.mha.set_fastpath_enabled(fused)
    return output, float(counter.get_total_flops())


def training_passes(backbone: nn.Module) -> float:
    """What a training step costs in a backbone, in forward passes: 3 where all of it learns, 1 where none does.

    From the first block that learns on, gradients flow through (a second pass); a third one is for the weights that
    learn, by their share of each block.
    """
    blocks = list(getattr(backbone, "blocks", [])) or [backbone]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    learns_first = any(
        parameter.requires_grad and id(parameter) not in inside and not name.startswith("norm.")
        for name, parameter in backbone.named_parameters()
    )
    flowing, passes = learns_first, 0.0
    for block in blocks:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in block.parameters()]
        learning = sum(size for size, learns in sizes if learns)
        flowing = flowing or learning > 0
        passes += 1.0 + (1.0 + learning / sum(size for size, _ in sizes) if flowing else 0.0)
    return passes / len(blocks)
