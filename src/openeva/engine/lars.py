"""LARS, the optimizer of linear probes: momentum SGD whose step is scaled per tensor by |weight| / |gradient|.

gradient + decay * weight -> * trust * |weight| / |gradient| -> momentum -> weight

Paper: You et al. (arXiv 1708.03888). Source: spec section 5.4: tensors with one axis get neither decay nor scaling, and
a norm of zero means a scale of 1.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Lars(torch.optim.Optimizer):
    """See the module's text.

    Steps at which the tensor `found_inf` (set by the loop, as torch's fused optimizers read it) is 1 change nothing,
    and the device is not waited for. Sharded weights are scaled by the norms of the whole tensors.

    Args:
        params: Parameters or groups; a group may have its own `lr` and `weight_decay`.
        lr: Learning rate.
        momentum: Share of the last step that is kept.
        weight_decay: Added to the gradient as `weight_decay * weight`.
        trust_coefficient: Length of a step relative to the weight's norm, per unit of `lr`.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient: Tensor = parameter.grad  # type: ignore[assignment]  # asked by the caller
        if parameter.ndim > 1:
            gradient = gradient + group["weight_decay"] * parameter
            gradient = gradient * _trust(parameter, gradient, group["trust_coefficient"])
        weight, momentum, change = (_local(t) for t in (parameter, state["momentum_buffer"], gradient))
        new = group["momentum"] * momentum + change
        if self.found_inf is not None:
            new = torch.where(self.found_inf > 0, momentum, new)
            weight.sub_(torch.where(self.found_inf > 0, torch.zeros_like(new), group["lr"] * new))
        else:
            weight.sub_(group["lr"] * new)
        momentum.copy_(new)


def _trust(weight: Tensor, gradient: Tensor, coefficient: float) -> Tensor:
    weight_norm, gradient_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
    usable = (weight_norm > 0) & (gradient_norm > 0)
    return torch.where(usable, coefficient * weight_norm / gradient_norm, torch.ones_like(weight_norm))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
