"""Division of a run among its processes, and every check of it that needs neither data nor the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from xlstm_lm.parallel.process_group import Axis, World
from xlstm_lm.training.carried_states import check_carry_state
from xlstm_lm.training.config import split_batch
from xlstm_lm.training.deepspeed_config import Precision, zero_stage
from xlstm_lm.training.run_config import RunConfig
from xlstm_lm.training.sequence_parallel import check_sequence_parallel


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Division of a run among its processes."""

    rows: int
    """Rows of a micro batch on each process."""
    micro_batches: int
    """Micro batches of a step on each process."""
    stage: int
    """ZeRO stage."""


def check_layout(run: RunConfig, world: World, precision: Precision) -> Layout:
    """Check a run before anything is opened or built. A dry run makes the same checks as training.

    Args:
        run: Configuration of the run.
        world: Processes of the run; those of a dry run do not exist.
        precision: Number format of the products.

    Raises:
        ValueError: Schedule, profile, limits of sources, division of rows, states to carry, batch, ZeRO stage or
            optimizer do not fit the run or each other.
    """
    run.schedule.check_steps(run.training.steps)
    run.profile.check_steps(run.training.steps)
    run.data.check_steps(run.training.steps)
    check_sequence_parallel(run)
    if run.training.carry_state:
        check_carry_state(run.model)
    rows, micro_batches = split_batch(run.data.global_batch_size, world.data.size, run.training.micro_batch_size)
    stage = zero_stage(run.deepspeed, precision)
    run.optimizer.check_layout(stage)
    return Layout(rows=rows, micro_batches=micro_batches, stage=stage)


def first_process(processes: int, sequence: int) -> World:
    """Rank 0 of processes that do not exist, before they have a process group."""
    world = World(rank=0, size=processes, local_rank=0, device=torch.device("cpu"))
    world.check_sequence(sequence)
    axes = {"data": Axis(rank=0, size=processes // sequence), "sequence": Axis(rank=0, size=sequence)}
    return dataclasses.replace(world, **axes)
