"""Learning-rate and weight-decay schedules, as functions of the optimizer step.

Source: spec section 5.3; of EVA-CLIP section 2.4; of video section 4. Warm-up over W steps rises linearly to the base
value at step W-1, from 0 at step 0, or (CLIP) from the W-th part of the base value; or (video) from 0 to the base value
at step W. The decay then starts at the base value (again) and approaches the final value without reaching it (cosine)
or reaches it (linear). Difference of video: step k uses the rate of k, not of k-1 (quirk of the official loop).
"""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear"]
WarmupFrom = Literal["zero", "first_step", "zero_before"]


@dataclass(frozen=True)
class Schedule:
    """A value per optimizer step.

    Attributes:
        base: Peak value.
        final: Value that the decay heads for.
        total_steps: Length of the run.
        warmup_steps: Length of the linear rise, 0 for none.
        shape: Form of the decay.
        warmup_from: Value of step 0 of the rise: 0 ("zero_before": which adds to the base value one step later), or the
            same part of the base value that each step adds.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    shape: Shape = "cosine"
    warmup_from: WarmupFrom = "zero"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warm-up of {self.warmup_steps} steps does not fit into a run of {self.total_steps} steps"
            )

    def at(self, step: int) -> float:
        """The value that step `step` (from 0) uses; the last value after the end of the run."""
        step = min(step, self.total_steps - 1)
        if step < self.warmup_steps and self.warmup_from == "first_step":
            return self.base * (step + 1) / self.warmup_steps
        if step < self.warmup_steps and self.warmup_from == "zero_before":
            return self.base * step / self.warmup_steps
        if step < self.warmup_steps:
            return self.base * step / (self.warmup_steps - 1) if self.warmup_steps > 1 else self.base * step
        done, length = step - self.warmup_steps, self.total_steps - self.warmup_steps
        if self.shape == "linear":
            return self.base + (self.final - self.base) * (done / (length - 1) if length > 1 else 0.0)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * done / length))
