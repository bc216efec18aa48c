"""One step of a run of any number of processes in this one, for `xlstm-lm train --dry-run N`.

The process is rank 0 on torch's fake process group, whose collectives return at once: nothing is sent or received. It
opens no data and writes no files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from xlstm_lm.base import console
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.machine import memory_bytes
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.parallel.collectives import KINDS, CountCollectives
from xlstm_lm.parallel.live_bytes import LiveBytes
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.build import unbuilt_model
from xlstm_lm.training.deepspeed_config import Precision
from xlstm_lm.training.engine import MicroBatch, TrainingEngine
from xlstm_lm.training.layout import check_layout, first_process
from xlstm_lm.training.memory import needed_bytes, planned_shapes
from xlstm_lm.training.run_config import RunConfig
from xlstm_lm.training.sequence_parallel import deepspeed_section, with_divided_rows

MOST_WORK = 2e12
"""FLOPs of a step, some minutes on a few cores, beyond which the step has one short row for each micro batch."""
SHORT = 16
"""Tokens of a short row."""


class _FromNobody(CountCollectives):
    """A context that counts collectives and gives zeros for what the other ranks would send.

    The fake process group leaves that memory as it finds it. Numbers there that are not finite would skip the update.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = KINDS.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if kind in ("all-gather", "reduce-scatter", "all-to-all", "receive"):
            for received in [args[0]] if isinstance(args[0], Tensor) else args[0]:
                for tensor in [received] if isinstance(received, Tensor) else received:
                    tensor.zero_()
        return super().__torch_dispatch__(func, types, args, kwargs)


def dry_run(run: RunConfig, processes: int) -> list[str]:
    """Check the layout of a run on `processes` processes and run one step of it as rank 0.

    Returns:
        Lines for the user: rows, bytes on rank 0, collectives of a step.

    Raises:
        ValueError: the configuration cannot be trained on that many processes.
    """
    if processes < 1:
        raise ValueError(f"--dry-run is {processes}: give the number of processes of the run, 1 or more.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--dry-run stands for all processes: start it as one process, without a launcher.")
    # The machine of the run has GPUs, which multiply bf16; the one at hand may not.
    precision: Precision = "bf16" if run.training.precision == "auto" else run.training.precision
    world = first_process(processes, run.training.sequence_parallel)
    layout = check_layout(run, world, precision)
    rows, micro_batches = layout.rows, layout.micro_batches
    parameters = count_parameters(run.model)
    assumed = " (training.precision auto: as on a GPU)" if run.training.precision == "auto" else ""
    lines = [
        f"{processes} processes, ZeRO {layout.stage}, {precision}{assumed}. This shows rank 0 only; the data is not "
        "opened.",
        f"Rows: {run.data.global_batch_size} a step, {_count(rows * micro_batches, 'lane')} a rank; "
        f"{_count(rows, 'row')} of {run.data.context_length} tokens a micro batch, {micro_batches} of them a step.",
    ]
    if world.sequence.size > 1:
        lines.append(f"Each row is divided over {world.sequence.size} processes; those of a row have the same lanes.")
    state = sum(shape.numel() for shape in planned_shapes(run)[1].values())
    device, host = needed_bytes(run, world, precision, rows, parameters, state)
    planned = device | {f"{name} on the host": value for name, value in host.items()}
    lines.append("At least, a rank: " + ", ".join(f"{name} {_size(value)}" for name, value in planned.items()) + ".")
    needed = sum(value for name, value in (device | host).items() if name != "activations")
    if needed > memory_bytes(world.device):
        return [
            *lines,
            f"The step was not run: rank 0 of this model needs {_size(needed)} without activations, and this machine "
            f"has {_size(memory_bytes(world.device))}. Batch, stage and optimizer are checked; DeepSpeed's own checks "
            "are not. Fewer blocks (--model.num_blocks 2) run them here, with the same section deepspeed.",
        ]
    return lines + _step(run, world, precision, rows, micro_batches, parameters)


def _step(
    run: RunConfig, world: World, precision: Precision, rows: int, micro_batches: int, parameters: int
) -> list[str]:
    """Build the engine, run one step, and describe both. Sets up the fake process group."""
    length = run.data.context_length // world.sequence.size
    short = 6 * parameters * rows * micro_batches * length > MOST_WORK
    step_rows, step_length = (1, min(length, SHORT)) if short else (rows, length)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if not torch.distributed.is_initialized():  # stays for the life of the process, as DeepSpeed keeps groups of it
        torch.distributed.init_process_group("fake", rank=0, world_size=world.size, store=FakeStore())
    if torch.distributed.get_backend() != "fake" or torch.distributed.get_world_size() != world.size:
        raise ValueError("This process belongs to a run or to another dry run: start the dry run in one of its own.")
    console.stage(f"building rank 0 of {world.size} processes")
    torch.manual_seed(run.training.seed)
    model = with_divided_rows(unbuilt_model(run.model), world.with_sequence(world.sequence.size))
    model.activation_checkpointing = run.training.activation_checkpointing
    with LiveBytes() as building:
        engine = TrainingEngine(
            model,
            run.optimizer,
            deepspeed_section(run),
            world=world,
            precision=precision,
            micro_batch_size=rows,
            accumulation_steps=micro_batches,
            z_loss=run.training.z_loss,
        )
    console.stage("running one step")
    batches = [_random_rows(run, step_rows, step_length) for _ in range(micro_batches)]
    with LiveBytes() as step, _FromNobody() as sent:
        result = engine.train_step(batches, 1.0 / (step_rows * step_length * micro_batches), 0.0)
    if not result.applied:
        raise RunError("The dry run's step was not finite, on random tokens: its collectives are not those of a run.")
    held = engine.held_bytes()
    engine.close()
    console.end_stage()
    lines = ["Held after a step: " + ", ".join(f"{name} {_size(value)}" for name, value in held.items()) + "."]
    lines.append(f"Peak while the engine is built: {_size(building.peak)}.")
    measured = f"{_count(step_rows, 'row')} of {step_length} tokens a micro batch"
    lines.append(
        f"Peak of a step beside that: {_size(step.peak)} for gradients, buffers, and activations of {measured}."
    )
    lines.append("Collectives of a step, and the whole tensors that they work on:")
    for (kind, dtype), amount in sent.amounts.items():
        name = str(dtype).removeprefix("torch.") if dtype else ""
        lines.append(f"  {amount.calls:>6} {kind:<14} {name:<9} {_size(amount.bytes)}")
    if not sent.amounts:
        lines.append("  none")
    return lines


def _random_rows(run: RunConfig, rows: int, length: int) -> MicroBatch:
    tokens_BT = torch.randint(0, run.model.vocab_size, (rows, length))
    return tokens_BT, tokens_BT.roll(-1, 1), torch.zeros(rows, length, dtype=torch.bool)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
