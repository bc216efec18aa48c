"""Safeguards: steps whose numbers are not finite or outliers, and jobs that hang."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.fields import Count, CountOrZero, Positive, Range, check_fields
from xlstm_lm.base.program import told_once

logger = logging.getLogger("xlstm_lm")

NOT_FINITE = (
    "Weights are not finite: a step has overflowed, and no later one can repair that. Start from a checkpoint before "
    "it (its path as training.resume, another training.run_dir), or afresh, with a lower optimizer.learning_rate."
)


@dataclass(kw_only=True)
class SafeguardsConfig:
    """Steps whose loss or gradient is not finite or an outlier, and jobs that hang."""

    max_skipped_steps: CountOrZero = 10
    """Steps in a row that may be skipped for a loss or gradient that is not finite; one more stops the run."""
    spike_threshold: Positive | None = None
    """Deviations above the median of recent steps beyond which a step's loss or gradient norm is an outlier and its
    update is left out; null for no check."""
    spike_window: Annotated[int, Range(8, 2**16)] = 128
    """Recent steps by which outliers are judged."""
    spike_patience: CountOrZero = 5
    """Outliers and steps that are not finite in a row that spike_threshold tolerates; at one more the run goes back."""
    spike_rollbacks: CountOrZero = 3
    """Returns to a checkpoint within spike_rollback_steps; one more stops the run."""
    spike_rollback_steps: Count = 10_000
    """Steps within which spike_rollbacks counts."""
    hang_start_minutes: Positive | None = 120.0
    """Time for the start and the first step, which compiles; a job that needs longer is ended; null for no limit."""
    hang_step_minutes: Positive | None = 30.0
    """The same for a later step, with its wait for data."""
    hang_validation_minutes: Positive | None = 120.0
    """The same for a validation."""
    hang_save_minutes: Positive | None = 120.0
    """The same for the part of a save for which training waits."""

    @property
    def phase_seconds(self) -> dict[str, float | None]:
        """Seconds that each phase of a rank may last; None for no limit."""
        start = self.hang_start_minutes
        minutes = {
            "start": start,
            "compile": start,
            "step": self.hang_step_minutes,
            "validation": self.hang_validation_minutes,
            "save": self.hang_save_minutes,
        }
        return {phase: None if limit is None else 60 * limit for phase, limit in minutes.items()}

    def __post_init__(self) -> None:
        check_fields(self, "safeguards.")


class SkipCounter:
    """Counts the steps that changed nothing because a loss or gradient was an outlier or not finite."""

    def __init__(self, config: SafeguardsConfig, total: int = 0, in_a_row: int = 0) -> None:
        """Continue from the counts of earlier sessions."""
        self.config, self.total, self.in_a_row = config, total, in_a_row

    def observe(
        self,
        applied: bool,
        step: int,
        document_ids: Callable[[], list[str]],
        weights_are_finite: Callable[[], bool],
        outlier: str = "",
    ) -> str:
        """Count a step (numbered from 1). Both functions are collective: all ranks call them or none.

        Args:
            applied: Whether the update of the step was applied.
            step: Number of the step.
            document_ids: Gives the documents of its batch.
            weights_are_finite: Tells whether all weights are finite.
            outlier: Clause that says which of its numbers was an outlier; empty if none was.

        Returns:
            Report of the skipped step, which is also logged; empty if the step was applied.

        Raises:
            RunError: more were skipped in a row than allowed; names the step and the documents of its batch.
        """
        if applied:
            self.in_a_row = 0
            return ""
        self.total += 1
        if outlier:
            self.in_a_row = 0
            return _logged(f"Step {step} skipped: {outlier}. Weights are unchanged.")
        self.in_a_row += 1
        finite = weights_are_finite()
        if self.in_a_row <= self.config.max_skipped_steps:
            weights = "Weights are unchanged." if finite else "Weights are not finite either."
            return _logged(f"Step {step} skipped: its loss or gradient is not finite. {weights}")
        if finite:
            cause = (
                f"The documents of this step's batch: {', '.join(document_ids())}. Look at them, or lower "
                "optimizer.learning_rate or optimizer.gradient_clip; the checkpoints saved so far are intact."
            )
        else:
            cause = NOT_FINITE
        problem = RunError(
            f"Step {step}: the loss or gradient was not finite for {self.in_a_row} steps in a row, more than "
            f"safeguards.max_skipped_steps ({self.config.max_skipped_steps}). {cause}"
        )
        raise told_once(problem)


def _logged(message: str) -> str:
    logger.warning(message)
    return message
