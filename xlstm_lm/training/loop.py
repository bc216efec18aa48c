"""The training of a run, from its first step to its last: the checks before it, and how it ends."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import torch

from xlstm_lm.base import console
from xlstm_lm.data import TrainingData
from xlstm_lm.parallel.launcher import program_command
from xlstm_lm.parallel.process_group import join_world, lost_processes_explained
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.picture import draw_learning_curve
from xlstm_lm.training.deepspeed_config import choose_precision
from xlstm_lm.training.layout import check_layout
from xlstm_lm.training.memory_check import check_run_memory
from xlstm_lm.training.out_of_memory import memory_errors_explained
from xlstm_lm.training.profile import record_memory, write_memory_snapshot
from xlstm_lm.training.run_config import RunConfig
from xlstm_lm.training.stop_request import StopRequest
from xlstm_lm.training.trainer import Trainer


def train(run: RunConfig, data: TrainingData | None = None) -> Path:
    """Start or continue a run and train it to its last step. Every process of the run calls this.

    Args:
        run: Configuration of the run.
        data: Data to train on; None for the documents that `run.data` names.

    Returns:
        The run's folder.

    Raises:
        ValueError: the configuration cannot be trained, the run folder or a checkpoint does not fit it, or another
            process trains in the folder.
        RunError: the disk is full, too many steps in a row were outliers or not finite, or the run folder has
            disappeared.
        SystemExit: with code 0, after SIGTERM, SIGUSR1, Ctrl-C or training.max_hours, once the run is saved; with 128
            plus the signal's number, at once, after SIGTERM or SIGUSR1 before the first step is made.
    """
    world = join_world()
    # Decaying states and moments pass through denormal numbers, which slow a CPU down a hundred times.
    torch.set_flush_denormal(True)
    world = world.with_sequence(run.training.sequence_parallel)
    precision = choose_precision(run.training.precision, world.device)
    layout = check_layout(run, world, precision)
    check_run_memory(run, world, precision, layout)
    stop_request = StopRequest(run.training.max_hours)
    record_memory(run.profile, world.device)

    def snapshot() -> Path | None:
        return write_memory_snapshot(run.profile, RunFolder(run.training.folder).profile_path, world)

    explained = memory_errors_explained(run, world, precision, layout.rows, snapshot)
    with stop_request, contextlib.ExitStack() as resources, explained, lost_processes_explained(world):
        try:
            trainer = Trainer(run, world, layout, stop_request, resources, data)
            stopped = trainer.run_steps()
        finally:
            stop_request.note_only()
        trainer.record_end(stopped)
    if world.is_first:
        folder = RunFolder(trainer.run_dir)
        draw_learning_curve(folder.metrics(), folder.curve_path, trainer.run_dir.resolve().name)
        if stopped:
            words = [*program_command(launched=True), "train", "--config", str(folder.config_path)]
            how = f" Continue with: {shlex.join(words)}" if data is None else ""
            console.say(f"Saved step {trainer.step} of {run.training.steps}.{how}")
    if stopped:
        raise SystemExit(0)
    return trainer.run_dir
