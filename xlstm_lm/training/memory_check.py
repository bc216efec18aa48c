"""Refuse a run whose planned memory is more than its GPU has, before anything is allocated there."""

from __future__ import annotations

import logging

from xlstm_lm.base.machine import memory_bytes
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.deepspeed_config import Precision
from xlstm_lm.training.layout import Layout
from xlstm_lm.training.memory import check_memory, elements_of, gib, rank_layout
from xlstm_lm.training.memory_model import memory_plan
from xlstm_lm.training.out_of_memory import remedies
from xlstm_lm.training.run_config import RunConfig

logger = logging.getLogger("xlstm_lm")

TOLERANCE = 0.1
"""Share by which the model of memory may be wrong: a run is refused only beyond it."""


def check_run_memory(run: RunConfig, world: World, precision: Precision, layout: Layout) -> None:
    """Refuse a run that cannot fit: by a lower bound on any device, then on a GPU by its plan.

    A run whose plan exceeds the memory by less than the plan's error is warned of.

    Args:
        run: Configuration of the run.
        world: All processes.
        precision: Type of weights and activations.
        layout: Division of the run among them.

    Raises:
        ValueError: the device or the host has less memory than the bound, or the GPU has less than the plan by more
            than the plan's error; names the amounts and the remedies.
    """
    check_memory(run, world, precision, layout.rows)
    if world.device.type != "cuda":
        return
    of_rank = rank_layout(run, world.size, precision, layout, world.device.type)
    plan = memory_plan(run.model, elements_of(run), of_rank)
    memory = memory_bytes(world.device)
    if plan.peak <= memory:
        return
    items = ", ".join(f"{name} {gib(value)}" for name, value in plan.items.items() if value > plan.peak / 100)
    message = (
        f"By its plan the run needs {gib(plan.peak)} GiB on each GPU ({items}; phase: {plan.phase}), and "
        f"{world.device} has {gib(memory)}. Change, the most useful first: "
        f"{'; '.join(remedies(run, world, precision, layout.rows))}. 'xlstm-lm plan' shows every ZeRO stage."
    )
    if plan.peak <= (1 + TOLERANCE) * memory:
        if world.is_first:
            logger.warning("The run may not fit. %s", message)
        return
    raise ValueError(message)
