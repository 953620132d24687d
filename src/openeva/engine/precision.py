"""Reduced precision, loss scaling, and the decision whether a step's gradient is fit to use, all without a device sync.

loss -> backward of the scaled loss -> `finish`: unscale and clip in one pass, `found_inf` on the device -> the fused
optimizer skips the step where `found_inf` is 1 -> `update` changes the scale.

Source: spec section 5.4: scale 2^16 at the start, doubled after 500 clean steps, halved on overflow with a hysteresis
of 2 that growth refills, never below 1. Deliberate difference: weights stay fp32 and autocast is used, instead
of casting the model.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

GROWTH_INTERVAL_STEPS = 500
HYSTERESIS = 2


def resolve_precision(name: PrecisionName, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """`auto` is bf16 where the hardware multiplies it natively (CPUs with AMX or AVX512-bf16 too), else fp32.

    Raises:
        ValueError: An unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"unknown precision {name!r}; give auto, {', '.join(DTYPES)}")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        flags = torch.backends.cpu.get_cpu_capability()
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() or "SVE" in flags
        return "bf16" if native else "fp32"
    return "fp32"


class Precision:
    """Autocast, the loss scale, and the finite check of one run.

    Attributes:
        name: "bf16", "fp16" or "fp32".
        found_inf: 1.0 where the last gradient had a non-finite value (device tensor).
        bad_steps: Skipped steps so far (device tensor).
        bad_in_a_row: Skipped steps since the last good one (device tensor).
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name = resolve_precision(name, device)
        self.device = device
        self.dtype = DTYPES[self.name]
        zero = torch.zeros((), device=device)
        self.scale = zero + (2.0**16 if self.name == "fp16" else 1.0)
        self.good_in_a_row = zero.clone()
        self.hysteresis = zero + HYSTERESIS
        self.found_inf = zero.clone()
        self.bad_steps = zero.clone()
        self.bad_in_a_row = zero.clone()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for the forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Backward of the scaled loss, outside autocast."""
        with torch.autocast(self.device.type, enabled=False):
            (loss * self.scale if self.name == "fp16" else loss).backward()

    @torch.no_grad()
    def finish(self, module: nn.Module, loss: Tensor, clip_grad: float | None) -> Tensor:
        """Unscale and clip the gradient in one pass; set `found_inf`.

        Returns:
            The norm of the unscaled gradient before clipping (device tensor, the same on all processes).
        """
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)
        if hasattr(norm, "full_tensor"):  # sharded parameters: the norm over all shards
            norm = norm.full_tensor()
        norm = norm / self.scale
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self.found_inf = (~finite).float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.found_inf, op=dist.ReduceOp.MAX)
        if clip_grad is not None or self.name == "fp16":
            factor = 1.0 / self.scale
            if clip_grad is not None:
                factor = factor * torch.clamp(clip_grad / (norm + 1e-6), max=1.0)
            # a non-finite factor only ever meets a step that is skipped
            for group in _by_dtype(gradients):
                torch._foreach_mul_(group, factor)
        return norm

    @torch.no_grad()
    def update(self) -> None:
        """Count the step as good or bad and adapt the loss scale; call once after each optimizer step."""
        bad = self.found_inf
        self.bad_steps += bad
        self.bad_in_a_row = (self.bad_in_a_row + bad) * bad
        if self.name != "fp16":
            return
        halve = bad * (self.hysteresis <= 1)
        self.hysteresis = torch.where(bad > 0, (self.hysteresis - 1).clamp(min=1), self.hysteresis)
        self.good_in_a_row = (self.good_in_a_row + 1) * (1 - bad)
        grow = (self.good_in_a_row >= GROWTH_INTERVAL_STEPS).float()
        self.good_in_a_row *= 1 - grow
        self.hysteresis = torch.where(grow > 0, torch.full_like(grow, HYSTERESIS), self.hysteresis)
        self.scale = (self.scale * (1 + grow) * (1 - 0.5 * halve)).clamp(min=1.0)

    def bad_streak(self) -> int:
        """Skipped steps since the last good one; waits for the device."""
        return int(self.bad_in_a_row.item())

    @torch.no_grad()
    def rewound(self, bad_steps: Tensor, rewinds: int) -> None:
        """After a return to a checkpoint: keep the count of skipped steps, start a new streak, lower the loss scale."""
        self.bad_steps = bad_steps
        self.bad_in_a_row = torch.zeros_like(self.bad_in_a_row)
        self.scale = (self.scale / 4.0**rewinds).clamp(min=1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """What an exact resume needs."""
        return {
            "scale": self.scale,
            "good_in_a_row": self.good_in_a_row,
            "hysteresis": self.hysteresis,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        for key, value in state.items():
            setattr(self, key, value.to(self.device).clone())


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
