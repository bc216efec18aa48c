"""The check of a run's kernels against their definitions, before its first step."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from xlstm_lm.base.announce import announce_once
from xlstm_lm.models.mixers.mixer import OperationUse
from xlstm_lm.ops.mlstm.triton_launch import TUNED
from xlstm_lm.ops.operation import choose, refuse, verdict
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.sequence_parallel import uses_of_divided_rows


def check_kernels(config: Any, world: World, dtype: torch.dtype, micro_rows: int) -> dict[str, str]:
    """Agree on a right backend for each operation of a model over all ranks, and return its name by operation.

    Compares the backend that each operation takes in training, for `micro_rows` rows in `dtype` on this world's device,
    with its definition in float64: values and gradients, at the model's head sizes. A backend that is wrong, or does
    not run, on any rank is refused on all of them, and announced. One process of each node checks, and so compiles,
    before the others. Collective; leaves the random state as it was.
    """
    uses = config.operations(micro_rows)
    if world.sequence.size > 1:
        uses += uses_of_divided_rows(uses)
    if world.size > 1:
        _compile_once_a_node(uses, world, dtype)
    taken: dict[str, dict[str, None]] = {}
    for use in uses:
        taken.setdefault(use.operation.name, {})[_agree(use, world, dtype)] = None
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return {name: " and ".join(sorted(backends)) for name, backends in taken.items()}


def _compile_once_a_node(uses: list[OperationUse], world: World, dtype: torch.dtype) -> None:
    """Fill the compilers' caches of each node from one process, and launch tuned kernels as rank 0 does on all.

    Ranks that compile the same kernels at once would do the work of one many times over; ranks that each tune their own
    launches would round differently.
    """
    if world.local_rank == 0:
        for use in uses:
            call = use.call(world.device, dtype)
            with contextlib.suppress(ValueError):  # raised again by `_agree`, on every rank
                wanted = choose(use.operation, call, use.backend).backend
                if wanted != use.operation.reference:
                    verdict(use.operation, wanted, call)
    world.gather(None)  # rank 0 goes on when every node is done, and the others with it
    TUNED.update(world.from_first(TUNED))


def _agree(use: OperationUse, world: World, dtype: torch.dtype) -> str:
    """A backend that is right on every rank; all others that a rank would take before it are refused."""
    operation, call = use.operation, use.call(world.device, dtype)
    while True:
        choice = choose(operation, call, use.backend)
        wanted = world.from_first(choice.backend)
        problem = None
        if wanted != operation.reference:
            problem = dict(choice.passed_over).get(wanted) or verdict(operation, wanted, call)
        counts = torch.tensor([problem is not None, choice.backend != wanted], dtype=torch.int64, device=world.device)
        wrong, _ = world.sum_(counts).tolist()
        if not wrong:
            while (own := choose(operation, call, use.backend).backend) != wanted:
                refuse(operation, own, call, f"another process cannot take it, and all take {wanted!r}")
            return wanted
        where = f"on {wrong} of {world.size} processes" if world.size > 1 else f"on {world.device}"
        found = next(filter(None, world.gather(problem or "")), "")
        if world.is_first:
            announce_once(
                f"the {operation.name} kernel {wanted!r} does not compute its definition {where} ({found}): "
                "this run goes on without it, more slowly"
            )
        refuse(operation, wanted, call, f"it does not compute its definition {where} ({found})")
