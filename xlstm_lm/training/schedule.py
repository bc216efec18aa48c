"""The learning rate, a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from xlstm_lm.base.fields import CountOrZero, Ratio, Share, check_fields, in_steps


def _not_one(length: Any) -> Any:
    if isinstance(length, float) and length == 1:
        raise ValueError("one step or the whole run? Write 1 for one step, or the number of steps.")
    return length


CooldownShape = Literal["linear", "1-sqrt"]
"""Shape of the cool-down. 1-sqrt is from arXiv 2405.18392."""
Length = Annotated[CountOrZero | Share, BeforeValidator(_not_one)]
"""Length in steps or, below 1, as a share of the run's steps."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, a middle part, and a cool-down to zero."""

    kind: Literal["cosine", "exponential", "wsd", "constant"] = "cosine"
    """Middle part: cosine or exponential from 1 to final_ratio; wsd and constant stay at 1."""
    warmup: Length = 100
    """Steps of the linear warm-up or, below 1, their share of training.steps."""
    final_ratio: Ratio = 0.1
    """Learning rate, over the peak, at the end of a cosine or exponential middle part."""
    cooldown: Length = 0
    """Steps of the cool-down to zero at the end of the run or, below 1, their share of training.steps; wsd needs
    some."""
    cooldown_shape: CooldownShape = "linear"
    """Factor of the learning rate when the share x of the cool-down is done: linear, 1 - x; 1-sqrt, 1 - sqrt(x)."""

    def __post_init__(self) -> None:
        check_fields(self, "schedule.")
        if self.kind == "exponential" and self.final_ratio == 0:
            raise ValueError("schedule.final_ratio is 0; it must be above 0 where schedule.kind is exponential.")
        if self.kind == "wsd" and self.cooldown == 0:
            raise ValueError(
                "schedule.kind is wsd (warm-up, stable, decay) but schedule.cooldown is 0: give the decay steps or "
                "a share of the run, such as 0.2, or choose schedule.kind constant."
            )

    def lengths(self, steps: int) -> tuple[int, int]:
        """Return the steps of the warm-up and of the cool-down in a run of `steps`.

        A share is rounded to whole steps. If a run continues with another number of steps, shares refer to that one.
        """
        warmup, cooldown = in_steps(self.warmup, steps), in_steps(self.cooldown, steps)
        if isinstance(self.warmup, float) and isinstance(self.cooldown, float) and self.warmup + self.cooldown <= 1:
            cooldown = min(cooldown, steps - warmup)  # where both were rounded up
        return warmup, cooldown

    def check_steps(self, steps: int) -> None:
        """Raise ValueError if warm-up and cool-down do not fit in a run of `steps`."""
        if sum(self.lengths(steps)) <= steps:
            return
        lengths = [
            f"schedule.{name} ({length}{f', {in_steps} steps' if isinstance(length, float) else ''})"
            for name, length, in_steps in zip(
                ("warmup", "cooldown"), (self.warmup, self.cooldown), self.lengths(steps), strict=True
            )
        ]
        raise ValueError(
            f"{lengths[0]} and {lengths[1]} together exceed training.steps ({steps}): shorten them, give shares "
            "of the run, such as 0.1, or lengthen the run."
        )


def learning_rate_ratio(config: ScheduleConfig, step: int, steps: int) -> float:
    """Compute the learning rate of step `step`, counted from 0, in a run of `steps`, relative to the peak.

    The warm-up's last step has the full rate: step s of w has (s + 1) / w. The middle part reaches its final ratio at
    its last step, where no part of the cool-down is done. All of it would be done, with a rate of 0, one step after the
    run's last: step s of c has done the share s / (c + 1).
    """
    warmup, cooldown = config.lengths(steps)
    if step < warmup:
        return (step + 1) / warmup
    middle = steps - warmup - cooldown
    progress = min((step - warmup + 1) / max(middle, 1), 1.0)
    if config.kind == "cosine":
        ratio = config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.kind == "exponential":
        ratio = config.final_ratio**progress
    else:
        ratio = 1.0
    cooled = step - (steps - cooldown) + 1
    if cooled > 0:
        done = cooled / (cooldown + 1)
        ratio *= 1 - (math.sqrt(done) if config.cooldown_shape == "1-sqrt" else done)
    return ratio
