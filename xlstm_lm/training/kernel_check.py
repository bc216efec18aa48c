"""The kernels of a run against their definitions, before its first step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.models.mamba import MambaConfig
from xlstm_lm.models.xlstm_config import XLSTMConfig
from xlstm_lm.ops import conv as conv_ops
from xlstm_lm.ops import mlstm as mlstm_ops
from xlstm_lm.ops import selective_scan as scan_ops
from xlstm_lm.ops import slstm as slstm_ops
from xlstm_lm.ops import ssd as ssd_ops
from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.mlstm.triton_launch import super_chunks_of
from xlstm_lm.ops.selfcheck import (
    TOLERANCE,
    Checked,
    compare,
    from_state_to_state,
    mlstm_inputs_and_state,
    scan_inputs,
    slstm_inputs,
    some_resets,
    ssd_inputs,
    with_states,
)
from xlstm_lm.parallel.process_group import World

SLOWER = ("mlstm", "chunkwise", "batched", "recurrence")
"""What a run falls back to: the first that is right, as the last is."""


@dataclass(frozen=True)
class _Case:
    """An operation on the model's own head sizes."""

    module: ModuleType
    choose: Callable[[list[Tensor]], str]
    """The backend that "auto" means for such inputs."""
    function: Checked
    inputs: list[Tensor]

    def problem(self, backend: str) -> str:
        """What is wrong with a backend here; empty if nothing is."""
        tolerance = TOLERANCE[self.inputs[0].dtype]
        run = functools.partial(self.function, resets=some_resets(self.inputs))
        try:
            with super_chunks_of(2):
                error = compare(
                    functools.partial(run, backend=backend), functools.partial(run, backend="recurrence"), self.inputs
                )
        except Exception as caught:  # whatever a compiler or a driver comes up with
            return (str(caught).strip() or type(caught).__name__).splitlines()[0]
        return "" if error <= tolerance else f"error {error:.1e}, allowed {tolerance:.0e}"


def with_kernels_that_are_right(
    config: Any, world: World, dtype: torch.dtype, micro_rows: int
) -> tuple[Any, dict[str, str]]:
    """The model configuration, with another backend named where the one it would take computes something else; and the
    backend that each of its operations takes.

    Compares, on small inputs with the model's head sizes and in `dtype`, the kernels that the model takes on this
    world's device for `micro_rows` rows with their definitions in float64, values and gradients. A kernel that is
    wrong, or does not run, on any rank is replaced on all of them, and announced. Collective; leaves the random state
    as it was. (The causal convolution checks its kernel by itself, for its own width: here, before the first step.)
    """
    if isinstance(config, XLSTMConfig):
        operations = _xlstm_operations(config, world.device, dtype, micro_rows)
    elif isinstance(config, MambaConfig):
        operations = _mamba_operations(config, world.device, dtype)
    else:
        return config, {}
    taken = {}
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        for name, cases in operations:
            field = f"{name}_backend"
            taken[name], is_as_configured = _backend_for_all(name, getattr(config, field), cases, world)
            if not is_as_configured:
                config = dataclasses.replace(config, **{field: taken[name]})
        convolutions = {_convolution(width, config.conv_width, world.device, dtype) for width in _conv_widths(config)}
        if convolutions:
            taken["conv"] = " and ".join(sorted(convolutions))
    if devices:
        torch.cuda.empty_cache()
    return config, taken


def _conv_widths(config: XLSTMConfig | MambaConfig) -> set[int]:
    """The numbers of channels that the model's causal convolutions have."""
    if isinstance(config, XLSTMConfig):
        widths = {"slstm": config.embedding_dim, "mlstm_paper": config.paper_inner_dim}
        return {width for kind, width in widths.items() if kind in config.block_kinds()}
    return {config.inner_dim + (2 * config.num_groups * config.states if config.version == 2 else 0)}


def _convolution(channels: int, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a causal convolution takes."""
    x_BTD, weight_DW = (
        torch.empty(shape, device=device, dtype=dtype) for shape in ((1, 1, channels), (channels, width))
    )
    return conv_ops.choose_backend(x_BTD, weight_DW)


def _backend_for_all(name: str, configured: str, cases: list[_Case], world: World) -> tuple[str, bool]:
    """A backend that is right on every rank, and whether it is what the configuration means on all of them."""
    module = cases[0].module
    own = configured
    if configured == "auto":
        own = cases[0].choose([each.detach().requires_grad_() for each in cases[0].inputs])
    wanted = world.from_first(own)
    for backend in dict.fromkeys((wanted, *(each for each in SLOWER if each in module.BACKENDS))):
        problems = [] if backend == "recurrence" else [case.problem(backend) for case in cases]
        problem = next(filter(None, problems), "")
        counts = torch.tensor([bool(problem), own != wanted], dtype=torch.int64, device=world.device)
        wrong, different = world.sum_(counts).tolist()
        if not wrong:
            return backend, not different and backend == wanted
        where = f"on {wrong} of {world.size} processes" if world.size > 1 else f"on {world.device}"
        found = next(filter(None, world.gather(problem)), "")
        if world.is_first:
            announce_once(
                f"the {name} kernel {backend!r} does not compute its definition {where} ({found}): "
                "this run goes on without it, more slowly"
            )
    raise AssertionError("the definition is always right")


def _xlstm_operations(
    config: XLSTMConfig, device: torch.device, dtype: torch.dtype, micro_rows: int
) -> Iterator[tuple[str, list[_Case]]]:
    """Each operation that the model has, with its head sizes."""
    kinds, heads = set(config.block_kinds()), config.num_heads
    widths = {"mlstm": (config.qk_dim, config.v_dim), "mlstm_paper": (config.paper_inner_dim,) * 2}
    sizes = [(k // heads, v // heads) for kind, (k, v) in widths.items() if kind in kinds]
    mlstm = functools.partial(
        mlstm_ops.mlstm, input_gate=config.input_gate, chunk_length=config.chunk_length, eps=config.cell_eps
    )
    if sizes:
        inputs = [mlstm_inputs_and_state(device, dtype, H=min(heads, 2), K=K, V=V) for K, V in sizes]
        choose = lambda inputs: mlstm_ops.choose_backend(*inputs, input_gate=config.input_gate)
        yield "mlstm", [_Case(mlstm_ops, choose, from_state_to_state(mlstm), each) for each in inputs]
    if "slstm" in kinds:
        D = config.embedding_dim // heads
        # A few steps of all rows, of which the kernels take more at a time where there are many; and many of a few.
        sizes = {"B": micro_rows, "T": 3, "H": heads}, {"B": 2, "T": 70, "H": min(heads, 2)}
        inputs = [slstm_inputs(device, dtype, **each, D=D) for each in sizes]
        choose = lambda inputs: slstm_ops.choose_backend(inputs[0])
        yield "slstm", [_Case(slstm_ops, choose, slstm_ops.slstm, each) for each in inputs]


def _mamba_operations(
    config: MambaConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, list[_Case]]]:
    """The recurrence of Mamba-1 or Mamba-2, with the model's head and state sizes."""
    if config.version == 1:
        inputs = scan_inputs(device, dtype, T=70, E=min(config.inner_dim, 64), N=config.states)
        choose = lambda inputs: scan_ops.choose_backend(inputs[0], inputs[2])
        yield "scan", [_Case(scan_ops, choose, with_states(scan_ops.selective_scan), inputs)]
        return
    heads, groups = min(config.num_heads, 2), min(config.num_groups, 2)
    steps = 300 if device.type == "cuda" else 70  # more than a chunk of the kernels there
    inputs = ssd_inputs(device, dtype, T=steps, H=heads, P=config.head_dim, G=groups, N=config.states)
    choose = lambda inputs: ssd_ops.choose_backend(inputs[0])
    yield "scan", [_Case(ssd_ops, choose, with_states(ssd_ops.ssd), inputs)]
