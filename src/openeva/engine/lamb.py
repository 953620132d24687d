"""LAMB, the optimizer of CLIP's large batches: Adam whose step is scaled per tensor by |weight| / |step|.

gradient -> moments m, v -> u = m / (sqrt(v) + eps) + decay * weight -> lr * |weight| / |u| * u

Paper: You et al. (arXiv 1904.00962). Source: spec section 2.4 of EVA-CLIP, both of its rules:

- "deepspeed" trained the released models: the ratio of the norms is kept within 0.01..10 and scales every tensor,
  decayed or not, and the bias correction scales the whole step, decay included.
- "nvlamb": the moments are corrected before they are divided, and the ratio, of any size, scales decayed tensors only.

In both, a norm of zero means a ratio of 1. Deliberate difference: the official runs flattened each group of parameters
(a tower's layer, decayed or not), cut it into one piece per process, and took the ratio of each piece, so that a step
depended on the number of GPUs. Here it is that of each whole tensor (q, k and v of a block are one), on however many
processes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

Rule = Literal["deepspeed", "nvlamb"]

MIN_RATIO, MAX_RATIO = 0.01, 10.0
ELEMENTS_AT_A_TIME = 2**23
"""Steps are computed for tensors of so many elements together, so that they need little memory beside the state."""


class Lamb(torch.optim.Optimizer):
    """See the module's text.

    Steps at which the tensor `found_inf` (set by the loop, as torch's fused optimizers read it) is 1 change nothing,
    and the device is never waited for.

    Args:
        params: Parameters or groups; a group may have any of the settings below as its own.
        lr: Learning rate.
        betas: Shares of the moments that are kept.
        eps: Added to the root of the second moment.
        weight_decay: Added to the step as `weight_decay * weight`.
        rule: Which LAMB.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rule: Rule = "deepspeed",
    ) -> None:
        # "fused" says what torch's fused optimizers say by it: a resumed run's step counts go to the device
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rule": rule, "fused": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there."""
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}  # sharded in the same way: their norms are summed in one go
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(_sharding(parameter), []).append(parameter)
            for parameters in alike.values():
                for some in _in_turn(parameters):
                    self._step(some, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            self._start(parameter)
        states = [self.state[parameter] for parameter in parameters]
        steps: list[Tensor] = [state["step"] for state in states]
        weights, gradients = [_local(p) for p in parameters], [_local(p.grad) for p in parameters]
        beta1, beta2 = group["betas"]
        corrected = group["rule"] == "nvlamb"
        # after infinitely many steps there is no bias to correct
        counts = steps if corrected else [torch.full_like(steps[0], torch.inf)] * len(steps)
        # Adam's fused kernel on weight_decay * weight instead of the weight, downwards, gives u in one pass
        changes = list(torch._foreach_mul(weights, group["weight_decay"]))
        adam(
            changes, gradients, [_local(s["exp_avg"]) for s in states], [_local(s["exp_avg_sq"]) for s in states], [],
            counts, fused=True, found_inf=self.found_inf, amsgrad=False, beta1=beta1, beta2=beta2, lr=-1.0,
            weight_decay=0.0, eps=group["eps"], maximize=False,
        )  # fmt: skip
        if not corrected:
            torch._foreach_add_(steps, 1.0 if self.found_inf is None else 1.0 - self.found_inf)
        factors_T = _ratios(weights, changes, parameters[0], group)
        if not corrected:
            steps_T = torch.stack(steps)
            factors_T = factors_T * (_one_minus_power(beta2, steps_T).sqrt() / _one_minus_power(beta1, steps_T))
        if self.found_inf is not None:
            factors_T = torch.where(self.found_inf > 0, 0.0, factors_T)
        torch._foreach_addcmul_(weights, changes, list(factors_T.unbind()), value=-group["lr"])

    def _start(self, parameter: Tensor) -> None:
        if not self.state[parameter]:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _in_turn(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of not much more than `ELEMENTS_AT_A_TIME`; of sharded ones alike on all processes."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(t.numel() for t in some) + tensor.numel() > ELEMENTS_AT_A_TIME:
            yield some
            some = []
        some.append(tensor)
    yield some


def _ratios(weights: list[Tensor], changes: list[Tensor], like: Tensor, group: dict[str, Any]) -> Tensor:
    """|weight| / |change| of each tensor, `[T]`; `like` says how they are sharded."""
    weight_T, change_T = _norms([*weights, *changes], like).chunk(2)
    ratio_T = weight_T / change_T
    if group["rule"] == "deepspeed":
        ratio_T = ratio_T.clamp(MIN_RATIO, MAX_RATIO)
    elif not group["weight_decay"]:
        return torch.ones_like(ratio_T)
    return torch.where((weight_T > 0) & (change_T > 0), ratio_T, 1.0)


def _norms(pieces: list[Tensor], like: Tensor) -> Tensor:
    """Norms of the whole tensors that these are pieces of."""
    norms_T = torch.stack(torch._foreach_norm(pieces))
    if not isinstance(like, DTensor):
        return norms_T
    squares_T = norms_T.square()
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            dist.all_reduce(squares_T, group=like.device_mesh.get_group(axis))
    return squares_T.sqrt()


def _one_minus_power(base: float, exponent: Tensor) -> Tensor:
    """1 - base^exponent, exact also where the power is near 1."""
    return -torch.expm1(exponent * (math.log(base) if base else -math.inf))


def _sharding(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
