"""Train the runs of a design through the study engine, trunks before their branches."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eval.scaling_laws.designed import DESIGN, Design, DesignedRun
from eval.study import engine
from eval.study.engine import PlannedRun, RunState, examine
from eval.study.jobs import Outcome, alone_in
from xlstm_lm.runs.folder import RunFolder


class Work:
    """The runs of a design and their states."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self.planned = {run.run: PlannedRun(run.architecture, design.config(run)) for run in design.runs}

    def state(self, run: DesignedRun) -> RunState:
        """Progress of a run."""
        return examine(self.planned[run.run])

    def can_begin(self, run: DesignedRun) -> bool:
        """Whether the checkpoint that a run starts from is there; always true for a run that is no branch."""
        return run.kind != "branch" or run.branch_step in RunFolder(self.design.run_folder(run.trunk)).checkpoints()

    @property
    def needed(self) -> list[PlannedRun]:
        """Runs that can begin, in the order in which they are trained."""
        return [self.planned[run.run] for run in self.design.runs if self.can_begin(run)]

    def is_lost(self, run: DesignedRun) -> bool:
        """Whether a run can never begin: the trunk of a branch is over without having kept its checkpoint."""
        return not self.can_begin(run) and self.state(self.design.named(run.trunk)).is_over

    @property
    def lost(self) -> list[DesignedRun]:
        """Branches of trunks that diverged before them."""
        return [run for run in self.design.runs if self.is_lost(run)]

    @property
    def left(self) -> list[DesignedRun]:
        """Runs that more training would finish."""
        return [run for run in self.design.runs if not self.state(run).is_over and not self.is_lost(run)]

    def train(
        self, *, at_once: int = 1, launch: Sequence[str] = (), max_seconds: float | None = None
    ) -> dict[str, Outcome]:
        """Train until all runs are over, a user stops it, or the time is up; return the outcome of each job.

        Args:
            at_once: runs at a time.
            launch: command that starts a training run; empty for this Python.
            max_seconds: for all runs together; None for no limit.

        Raises:
            ValueError: a folder holds a run of another configuration.
        """
        folder = self.design.folder
        engine.check_folders(self.planned.values(), folder / DESIGN, "design folder")
        command = [*(launch or (sys.executable, "-m")), "xlstm_lm", "train", "--config"]
        with alone_in(folder / "runs"):
            return engine.train(lambda: self.needed, command, at_once, max_seconds)

    def as_text(self) -> str:
        """List the state of every run."""
        lines = []
        for run in self.design.runs:
            state = self.state(run)
            waits = "" if self.can_begin(run) or state.is_over else f", waits for step {run.branch_step} of {run.trunk}"
            problem = f", {state.problem}" if state.problem else ""
            lines.append(f"{run.run} ({run.kind}, {run.steps:,} steps): {state.status}{problem}{waits}")
        return "\n".join(lines)
