"""Restoring a checkpoint into a training engine, at the start of a run and when it goes back."""

from __future__ import annotations

from functools import partial

import torch

from xlstm_lm.base.announce import announce_once
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.random_state import restore_random_state
from xlstm_lm.training.engine import TrainingEngine


def load_engine(checkpoint: Checkpoint, engine: TrainingEngine, world: World) -> list[str]:
    """Load weights and optimizer state, whatever the checkpoint's number of processes. Collective.

    An imported model has weights alone.

    Args:
        checkpoint: Intact checkpoint.
        engine: Engine of the same model.
        world: All processes of the run.

    Returns:
        Names of the tensors that are not finite, on all ranks.

    Raises:
        ValueError: the checkpoint belongs to another model.
    """
    broken: dict[str, None] = {}
    state = engine.state
    checkpoint.check_names("model", list(state.shapes))
    if not checkpoint.is_imported:
        checkpoint.check_names("optimizer", list(state.moment_shapes))

    def read(stem: str, name: str, start: int, stop: int) -> torch.Tensor:
        values_N = checkpoint.part(stem, name, start, stop)
        if not torch.isfinite(values_N).all():
            broken[name] = None
        return values_N

    moments = None if checkpoint.is_imported else partial(read, "optimizer")
    steps = 0 if checkpoint.is_imported else checkpoint.state["optimizer_steps"]
    state.load(partial(read, "model"), moments, steps)
    return list(dict.fromkeys(name for of_rank in world.all_gather(list(broken)) for name in of_rank))


def continue_random_state(checkpoint: Checkpoint, world: World) -> None:
    """Restore this rank's random states from a run's checkpoint; another number of processes is announced."""
    random_state = checkpoint.random_state(world.rank)
    if random_state is None or checkpoint.state["processes"] != world.size:
        announce_once(
            f"{checkpoint.folder} was written by {checkpoint.state['processes']} processes and goes on with "
            f"{world.size}: the order of the data is the same, random numbers and rounding are not."
        )
    if random_state is not None:
        restore_random_state(random_state)
