"""Advice for a run that does not fit in memory: the settings to change, those first that help this run most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.errors import first_line
from xlstm_lm.base.machine import is_out_of_memory, memory_bytes
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.deepspeed_config import Precision, zero_stage
from xlstm_lm.training.memory import gib, needed_bytes
from xlstm_lm.training.run_config import RunConfig

SHARDED = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}
"""Purposes of memory that each ZeRO stage divides over the processes."""


def remedies(run: RunConfig, world: World, precision: Precision, micro_batch_size: int) -> list[str]:
    """Phrases for the settings to change, the most useful first, with amounts of the lower bound of `check_memory`.

    The state (weights, gradients, optimizer) is what ZeRO divides; the rest of the memory is for activations. Where the
    state takes more than half of the memory, it comes first, otherwise the activations do.

    Args:
        run: Configuration of the run.
        world: All processes.
        precision: Type of weights and activations.
        micro_batch_size: Rows of a forward and backward pass.
    """
    parameters = count_parameters(run.model)
    state = run.optimizer.fewest_state_tensors * parameters
    device, _ = needed_bytes(run, world, precision, micro_batch_size, parameters, state)
    activations = device.pop("activations")
    for_state = _for_state(run, world, precision, device)
    for_activations = _for_activations(run, micro_batch_size, activations)
    state_first = sum(device.values()) > memory_bytes(world.device) / 2
    ordered = [*for_state, *for_activations] if state_first else [*for_activations, *for_state]
    return [*ordered, f"a smaller model (this one has {parameters:,} parameters)"]


def _for_activations(run: RunConfig, rows: int, activations: int) -> list[str]:
    found = []
    if not run.training.activation_checkpointing:
        kept = f"keeps {gib(activations)} GiB, one activation for each block, and computes the others again"
        found.append(f"training.activation_checkpointing true ({kept})")
    if rows > 1:
        fewer = max(each for each in range(1, rows // 2 + 1) if rows % each == 0)
        less = f"at least {gib(activations)} GiB of activations become {gib(activations * fewer // rows)}"
        found.append(f"training.micro_batch_size {fewer} instead of {rows} ({less})")
    length = run.data.context_length
    if length > 1:
        shorter = f"{gib(activations)} GiB become {gib(activations // 2)}, but documents are cut at that length"
        found.append(f"data.context_length {length // 2:,} instead of {length:,} ({shorter})")
    return found


def _for_state(run: RunConfig, world: World, precision: Precision, device: dict[str, int]) -> list[str]:
    stage, found = zero_stage(run.deepspeed, precision), []
    for higher in range(stage + 1, 4) if world.size > 1 else ():
        divided = [name for name in SHARDED[higher] if name not in SHARDED.get(stage, ()) and name in device]
        try:
            run.optimizer.check_layout(higher)
        except ValueError:
            break
        before = sum(device[name] for name in divided)
        amount = f"{' and '.join(divided)}: {gib(before)} GiB become {gib(before // world.size)}"
        found.append(f"deepspeed.zero_optimization.stage {higher} instead of {stage} ({amount})")
    found.reverse()  # the highest stage divides most
    if world.device.type == "cuda" and stage and "optimizer" in device:
        where = "deepspeed.zero_optimization.offload_optimizer.device"
        found.append(f"{where} cpu ({gib(device['optimizer'])} GiB move to the host)")
    if stage or world.size == 1:
        divided = [name for name in SHARDED[stage or 1] if name in device]
        if divided:
            needs = "" if stage else ", with deepspeed.zero_optimization.stage 1 to 3"
            shared = f"{gib(sum(device[name] for name in divided))} GiB of {' and '.join(divided)}"
            found.append(f"more processes than {world.size}, which share {shared}{needs}")
    return found


@contextlib.contextmanager
def memory_errors_explained(
    run: RunConfig,
    world: World,
    precision: Precision,
    micro_batch_size: int,
    snapshot: Callable[[], Path | None] = lambda: None,
) -> Iterator[None]:
    """Turn an allocation error into a RunError that names the settings to change.

    Args:
        run: Configuration of the run.
        world: All processes.
        precision: Type of weights and activations.
        micro_batch_size: Rows of a forward and backward pass.
        snapshot: Writes the recorded allocations and returns their file; None if there are none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        path = snapshot()
        written = f" The allocations are in {path}, for pytorch.org/memory_viz." if path else ""
        record = " --profile.memory true records what the memory is used for."
        unknown = record if world.device.type == "cuda" and not run.profile.memory else ""
        advice = "; ".join(remedies(run, world, precision, micro_batch_size))
        raise RunError(
            f"Out of memory with training.micro_batch_size {micro_batch_size} and data.context_length "
            f"{run.data.context_length}. Try, the most useful first: {advice}. Checkpoints saved so far are "
            f"intact.{written}{unknown} ({first_line(error)})"
        ) from error
