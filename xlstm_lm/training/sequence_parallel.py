"""Sequence parallelism in training: checks, slices of rows, and what it means for the model and DeepSpeed.

DeepSpeed knows nothing of it: ZeRO divides the model over all processes, and the loss of a slice is scaled as that of
whole rows, so the mean gradient over all processes is that of the global batch in any layout.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from xlstm_lm.data import Batch
from xlstm_lm.models.mixers.mixer import OperationUse
from xlstm_lm.ops.gated_delta import GATED_DELTA
from xlstm_lm.parallel.divided_rows import DividedRows
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.run_config import RunConfig


def check_sequence_parallel(run: RunConfig) -> None:
    """Check that rows of the run can be divided as training.sequence_parallel demands.

    Raises:
        ValueError: the model, the row length or the section deepspeed does not allow it; says how to change it.
    """
    size, length = run.training.sequence_parallel, run.data.context_length
    if size == 1:
        return
    setting = f"training.sequence_parallel is {size}"
    if not hasattr(run.model, "block_mixers"):
        raise ValueError(
            f"{setting}, but model.family {run.model.family} computes whole rows only: choose another family, or 1."
        )
    if length % size:
        raise ValueError(
            f"{setting}, which does not divide data.context_length {length}: choose a multiple of {size}, such as "
            f"{length // size * size or size}, or another number of processes."
        )
    widest = max(getattr(mixer, "conv_width", 1) for mixer in run.model.block_mixers())
    if length // size < widest - 1:
        raise ValueError(
            f"{setting}, which leaves slices of {length // size} tokens, but a convolution of the model looks back on "
            f"{widest - 1}: choose at most {length // (widest - 1)} processes, or longer rows."
        )
    if run.deepspeed.get("zero_optimization", {}).get("overlap_comm"):
        raise ValueError(
            f"{setting} and deepspeed.zero_optimization.overlap_comm is true: two processes could then begin their "
            "exchanges in different orders and wait for each other for ever. Set overlap_comm to false."
        )


def deepspeed_section(run: RunConfig) -> dict[str, Any]:
    """The recipe's section deepspeed, without the overlap that ZeRO 3 has by default where rows are divided."""
    if run.training.sequence_parallel == 1:
        return run.deepspeed
    section = copy.deepcopy(run.deepspeed)
    section.setdefault("zero_optimization", {})["overlap_comm"] = False
    return section


def with_divided_rows(model: nn.Module, world: World) -> nn.Module:
    """The model itself, which expects slices of rows if the world divides them."""
    if world.sequence.size > 1:
        model.divide_rows(DividedRows(world.sequence))
    return model


def uses_of_divided_rows(uses: list[OperationUse]) -> list[OperationUse]:
    """Further calls of a model's operations where rows are divided: the gated delta rule on V + K columns, by which
    backends without a pass for the state alone compute the effect of a slice."""
    deltas = [use for use in uses if use.operation is GATED_DELTA]
    return [use._replace(sizes=use.sizes | {"V": use.sizes["V"] + use.sizes["K"]}) for use in deltas]


def own_slice(batch: Batch, world: World) -> Batch:
    """This process's tokens of each row. Targets are cut with them, after they were shifted."""
    axis = world.sequence
    if axis.size == 1:
        return batch
    length = batch.tokens_BT.shape[1] // axis.size
    own = slice(axis.rank * length, (axis.rank + 1) * length)
    return dataclasses.replace(
        batch,
        tokens_BT=batch.tokens_BT[:, own],
        targets_BT=batch.targets_BT[:, own],
        resets_BT=batch.resets_BT[:, own],
    )
