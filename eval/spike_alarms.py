"""The steps of a run that a guard against loss spikes would have skipped, at several thresholds.

`python -m eval.spike_alarms RUN --thresholds 10 20 40`, for a run that logged every step (training.log_every 1) and has
no guard. In a run that learns as it should, each of these steps is a false alarm. The effect of a skipped step on later
ones is left out, except that its numbers do not count as recent ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xlstm_lm.base.fields import Positive, argument
from xlstm_lm.base.program import program
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.training.safeguards import SafeguardsConfig
from xlstm_lm.training.spikes import MEASURED, SpikeDetector


@dataclass(frozen=True)
class Alarms:
    """Outliers among the steps of a run."""

    judged: int
    """Steps that were judged: those after the first full window."""
    outliers: dict[str, list[int]]
    """Steps that are outliers by each measured quantity, and `either`."""

    @property
    def longest_row(self) -> int:
        """Most outliers in a row."""
        longest, row, last = 0, 0, -1
        for step in self.outliers["either"]:
            row = row + 1 if step == last + 1 else 1
            longest, last = max(longest, row), step
        return longest


def steps_of(run_dir: Path) -> list[tuple[int, tuple[float, float]]]:
    """Number, loss and gradient norm of each step of a run. Steps that were not finite are left out.

    Raises:
        ValueError: the run has logged no steps, or not every step.
    """
    records = [each for each in RunFolder(run_dir).metrics() if each["split"] == "train"]
    steps = [each["step"] for each in records]
    if not steps or steps != list(range(steps[0], steps[0] + len(steps))):
        raise ValueError(
            f"{run_dir} has {len(steps)} logged steps, not every one from the first to the last: give a run that was "
            "trained with --training.log_every 1."
        )
    return [
        (each["step"], (each["loss"], each["grad_norm"]))
        for each in records
        if each["loss"] is not None and each["grad_norm"] is not None
    ]


def alarms(steps: Iterable[tuple[int, tuple[float, float]]], threshold: float, window: int) -> Alarms:
    """Judge the steps of a run one after the other, as the guard does.

    Args:
        steps: Number, loss and gradient norm of each.
        threshold: As safeguards.spike_threshold.
        window: As safeguards.spike_window.
    """
    detector = SpikeDetector(threshold, window, torch.device("cpu"))
    judged = 0
    outliers: dict[str, list[int]] = {name: [] for name in (*MEASURED, "either")}
    for step, values in steps:
        judged += detector.is_ready
        if not detector.is_outlier(torch.tensor(values)):
            detector.accept()
            continue
        for name in (*detector.outlying(), "either"):
            outliers[name].append(step)
    return Alarms(judged, outliers)


@program("eval.spike_alarms")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.spike_alarms", description=__doc__)
    add, number = parser.add_argument, argument(Positive)
    add("run", type=Path, metavar="RUN", help="Folder of the run.")
    add("--thresholds", type=number, nargs="+", default=[5.0, 10.0, 20.0, 40.0], help="Default: 5 10 20 40.")
    add("--window", type=int, default=SafeguardsConfig.spike_window, metavar="STEPS", help="Default: %(default)s.")
    options = parser.parse_args(arguments)
    SafeguardsConfig(spike_window=options.window)  # refuses a window that the guard refuses
    steps = steps_of(options.run)
    found: dict[float, Alarms] = {each: alarms(steps, each, options.window) for each in options.thresholds}
    columns: list[Any] = ["threshold", *(f"by {name}" for name in MEASURED), "skipped", "of steps", "share", "in a row"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for threshold, each in found.items():
        counts = [len(each.outliers[name]) for name in (*MEASURED, "either")]
        share = f"{100 * counts[-1] / each.judged:.2f} %" if each.judged else "none judged"
        print(f"| {threshold:g} | {' | '.join(map(str, counts))} | {each.judged} | {share} | {each.longest_row} |")


if __name__ == "__main__":
    main()
