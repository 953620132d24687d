"""An averaged copy of the weights: average <- decay * average + (1 - decay) * weights after every step, in fp32.

Source: spec section 5.4 (decay 0.9999, no warm-up).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """The averaged copy; sharded wherever the weights are."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.averages = [p.detach().clone().float() for p in self.parameters]

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Move the average towards the weights; where `skipped` is 1 (a scalar on the device), leave it alone."""
        weight = (1.0 - self.decay) * (1.0 - skipped)
        averages = [_local(average) for average in self.averages]
        torch._foreach_lerp_(averages, [_local(p.detach()) for p in self.parameters], [weight] * len(averages))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the module holds the averaged weights."""
        raw = [p.detach().clone() for p in self.parameters]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        for name, average in self.state_dict().items():
            average.copy_(state[name])


def _local(tensor: Tensor) -> Tensor:
    """This process's shard; the average of a shard is the shard of the average."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
