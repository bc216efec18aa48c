"""A lower bound on the memory of a run, checked before anything is built."""

from __future__ import annotations

import os

import torch

from xlstm_lm.base.machine import memory_bytes
from xlstm_lm.models import build_model
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.deepspeed_config import Precision, zero_stage
from xlstm_lm.training.layout import Layout
from xlstm_lm.training.memory_model import Elements, RankLayout, divided_bytes
from xlstm_lm.training.optimizer import parameter_groups, state_shapes
from xlstm_lm.training.run_config import RunConfig

REMEDIES = (
    "choose a smaller model, lower training.micro_batch_size or data.context_length, set "
    "training.activation_checkpointing to true, or share the model out over more processes "
    "(deepspeed.zero_optimization.stage 1 to 3)"
)


def check_memory(run: RunConfig, world: World, precision: Precision, micro_batch_size: int) -> None:
    """Refuse a run that cannot fit, whatever its kernels need in addition.

    The bound counts weights, gradients, master weights and optimizer state as ZeRO divides them; one activation of the
    model's width for each block and token of a micro batch, which every backward pass keeps; and the rows of data.
    Building a model needs no more, because its weights are drawn one parameter at a time.

    Raises:
        ValueError: the device or the host has less memory; names the amounts and the remedies.
    """
    parameters = count_parameters(run.model)
    # Without building the model, because one that is far too large takes long to build even on the meta device.
    state = run.optimizer.fewest_state_tensors * parameters
    _check(run, world, needed_bytes(run, world, precision, micro_batch_size, parameters, state), parameters)
    state = sum(shape.numel() for shape in planned_shapes(run)[1].values())
    _check(run, world, needed_bytes(run, world, precision, micro_batch_size, parameters, state), parameters)


def planned_shapes(run: RunConfig) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Shapes of the run's parameters and of its optimizer's state, by name. Allocates no memory for them."""
    shapes, no_decay = _parameters_of(run)
    return shapes, state_shapes(run.optimizer, shapes, no_decay)


def elements_of(run: RunConfig) -> Elements:
    """Numbers of elements of the run's model and of its optimizer's state. Allocates no memory for them."""
    shapes, no_decay = _parameters_of(run)
    groups = parameter_groups(run.optimizer, shapes, no_decay)
    return Elements(
        parameters=sum(shape.numel() for shape in shapes.values()),
        state=sum(shape.numel() for shape in state_shapes(run.optimizer, shapes, no_decay).values()),
        largest_group=max(sum(shapes[name].numel() for name in group.names) for group in groups),
    )


def rank_layout(run: RunConfig, processes: int, precision: Precision, layout: Layout, device: str) -> RankLayout:
    """The part of a run that its memory depends on.

    Args:
        run: Configuration of the run.
        processes: Number of processes.
        precision: Type of weights and activations.
        layout: Division of the run among them.
        device: Type of the device, cpu or cuda.
    """
    return RankLayout(
        stage=layout.stage,
        processes=processes,
        precision=precision,
        rows=layout.rows,
        micro_batches=layout.micro_batches,
        context_length=run.data.context_length // run.training.sequence_parallel,
        checkpointing=run.training.activation_checkpointing,
        carries_state=run.training.carry_state,
        device=device,
        zero=run.deepspeed.get("zero_optimization", {}),
    )


def _parameters_of(run: RunConfig) -> tuple[dict[str, torch.Size], set[str]]:
    """Shapes of the run's parameters by name, and the names of those that are not decayed."""
    with torch.device("meta"):
        model = build_model(run.model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return shapes, model.no_decay_parameter_names()


def _check(run: RunConfig, world: World, needed: tuple[dict[str, int], dict[str, int]], parameters: int) -> None:
    device, host = needed
    if world.device.type == "cuda":
        _refuse_beyond(memory_bytes(world.device), device, run, parameters, f"{world.device} has")
    else:
        host = {name: host.get(name, 0) + device.get(name, 0) for name in device | host}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    here = "this machine has" if local == 1 else f"this machine has for {local} processes together"
    host = {name: local * value for name, value in host.items()}
    _refuse_beyond(memory_bytes(torch.device("cpu")), host, run, parameters, here)


def needed_bytes(
    run: RunConfig, world: World, precision: Precision, micro_batch_size: int, parameters: int, state: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that one process needs on its device and in the host's memory, by purpose.

    `parameters` and `state` are the numbers of elements of the model and of its optimizer's state.
    """
    zero, stage = run.deepspeed.get("zero_optimization", {}), zero_stage(run.deepspeed, precision)
    divided = divided_bytes(parameters, state, precision, stage, world.size)
    width = 2 if precision == "bf16" else 4
    tokens = micro_batch_size * run.data.context_length // run.training.sequence_parallel
    activation = tokens * run.model.embedding_dim * width
    rows = run.data.global_batch_size // world.data.size * run.data.context_length
    needed = {
        "weights": divided["weights"],
        "gradients": parameters * width // (world.size if stage >= 2 else 1),
        "optimizer": divided["master weights"] + divided["moments"],
        "activations": activation * (run.model.num_blocks + 1),
    }
    offloaded = {
        "weights": (zero.get("offload_param") or {}).get("device") == "cpu",
        "optimizer": (zero.get("offload_optimizer") or {}).get("device") == "cpu",
    }
    host = {name: needed.pop(name) for name, is_offloaded in offloaded.items() if is_offloaded}
    return needed, host | {"rows": 17 * rows}  # two int64 and a truth value for each token


def _refuse_beyond(memory: int, needed: dict[str, int], run: RunConfig, parameters: int, where: str) -> None:
    total = sum(needed.values())
    if total <= memory:
        return
    parts = ", ".join(f"{name} {gib(value)}" for name, value in needed.items() if value > total / 100)
    raise ValueError(
        f"The model has {parameters:,} parameters; with data.context_length {run.data.context_length:,} and "
        f"data.global_batch_size {run.data.global_batch_size:,} a run needs at least {gib(total)} GiB ({parts}), but "
        f"{where} {gib(memory)} GiB: {REMEDIES}."
    )


def gib(count: int) -> str:
    """A number of bytes in GiB."""
    return f"{count / 2**30:,.1f}"
