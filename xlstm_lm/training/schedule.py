"""The learning rate as a function of the step, and of nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, a middle part, and a linear cool-down to zero."""

    kind: Literal["cosine", "exponential", "wsd", "constant"] = "cosine"
    """Middle part: cosine or exponential from 1 to final_ratio; wsd and constant stay at 1."""
    warmup_steps: int = 100
    """Steps of the linear warm-up."""
    final_ratio: float = 0.1
    """Learning rate, over the peak, at the end of a cosine or exponential middle part."""
    cooldown_steps: int = 0
    """Steps of the linear cool-down to zero at the end of the run; wsd needs some."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.final_ratio <= 1 or (self.kind == "exponential" and self.final_ratio == 0):
            raise ValueError(
                f"schedule.final_ratio is {self.final_ratio}; it must lie between 0 and 1, and above 0 where "
                "schedule.kind is exponential."
            )
        if self.kind == "wsd" and self.cooldown_steps == 0:
            raise ValueError(
                "schedule.kind is wsd (warm-up, stable, decay) but schedule.cooldown_steps is 0: give the decay some "
                "steps, or choose schedule.kind constant."
            )

    def check_steps(self, steps: int) -> None:
        """Raise ValueError where warm-up and cool-down do not fit in a run of `steps`."""
        if self.warmup_steps + self.cooldown_steps > steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.warmup_steps}) and schedule.cooldown_steps ({self.cooldown_steps}) "
                f"together exceed training.steps ({steps}): shorten them or lengthen the run."
            )


def learning_rate_ratio(config: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) in a run of `steps`, over the peak.

    The warm-up's last step has the full rate: step s of w has (s + 1) / w. The middle part reaches its final ratio at
    its last step. The cool-down falls linearly from there and would reach 0 one step behind the last.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    middle = steps - config.warmup_steps - config.cooldown_steps
    progress = min((step - config.warmup_steps + 1) / max(middle, 1), 1.0)
    if config.kind == "cosine":
        ratio = config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.kind == "exponential":
        ratio = config.final_ratio**progress
    else:
        ratio = 1.0
    cooled = step - (steps - config.cooldown_steps) + 1
    if cooled > 0:
        ratio *= 1 - cooled / (config.cooldown_steps + 1)
    return ratio
