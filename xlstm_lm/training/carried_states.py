"""Recurrent states that go on from row to row of a lane, for truncated back-propagation through time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.models.mixers.mixer import State
from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.checkpoint_layout import CARRIED, Share


def check_carry_state(model: Any) -> None:
    """Check that every block of a model has a state whose size does not grow with the tokens.

    Raises:
        ValueError: a block is attention.
    """
    if any(mixer.kind == "attention" for mixer in getattr(model, "block_mixers", list)()):
        raise ValueError(
            "training.carry_state is true, but attention keeps the keys and values of all earlier tokens and not a "
            "state: choose a model of recurrent blocks alone, or set training.carry_state to false."
        )


class CarriedStates:
    """States of this rank's lanes after their last row. Without `training.carry_state` there are none."""

    def __init__(self, carry: bool, lanes: range, micro_rows: int, world: World) -> None:
        """Begin with empty states.

        Args:
            carry: training.carry_state.
            lanes: Lanes of this rank, one for each row of its batches.
            micro_rows: Rows of a micro batch.
            world: All processes of the run.
        """
        self._carry, self._lanes, self._micro_rows, self._world = carry, lanes, micro_rows, world
        self._blocks: list[State] | None = None
        """State of each block, each tensor with a row for each lane; None for empty states."""

    def before(self) -> list[list[State] | None]:
        """State of every block before each micro batch, None for empty ones; no states at all if none are carried."""
        if not self._carry:
            return []
        count = len(self._lanes) // self._micro_rows
        if self._blocks is None:
            return [None] * count
        parts = [[tensor.split(self._micro_rows) for tensor in block] for block in self._blocks]
        return [[tuple(tensor[index] for tensor in block) for block in parts] for index in range(count)]

    def follow(self, after: list[list[State]], applied: bool) -> None:
        """Go on with the states after a step's micro batches. Collective.

        Args:
            after: State of every block after each micro batch.
            applied: Whether the step was applied. If not, a state may hold numbers that are not finite: all lanes then
                go on from empty ones.
        """
        if not applied or not self._carry:
            self._blocks = None
            return
        blocks = [
            tuple(torch.cat(rows) for rows in zip(*of_block, strict=True)) for of_block in zip(*after, strict=True)
        ]
        axis = self._world.sequence
        if axis.size > 1:  # the end of a row is with the last process, the beginning of the next with the first
            blocks = [tuple(axis.from_last(tensor) for tensor in block) for block in blocks]
        self._blocks = blocks

    def stored_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the states of all lanes in a checkpoint, by stem and name; the same on all ranks."""
        lanes = len(self._lanes) * self._world.data.size
        shapes = {name: (lanes, *tensor.shape[1:]) for name, tensor in self._named()}
        return {CARRIED: shapes} if self._carry else {}

    def shares(self) -> dict[str, list[Share]]:
        """This rank's part of a checkpoint, its lanes, by stem; of ranks that divide rows only the first has one."""
        own = self._named() if self._world.sequence.rank == 0 else ()
        first = self._lanes.start
        shares = [Share(name, first * tensor[0].numel(), tensor.float().reshape(-1)) for name, tensor in own]
        return {CARRIED: shares} if self._carry else {}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on with the states of a run's checkpoint, whatever its number of ranks; with empty ones if it has none."""
        if not self._carry or checkpoint.is_imported:
            return
        blocks: dict[int, dict[int, Tensor]] = {}
        for name, (_, (_, *shape)) in checkpoint.forms(CARRIED).items():
            number, position = map(int, name.removeprefix("block_").split("."))
            size = math.prod(shape)
            values_N = checkpoint.part(CARRIED, name, self._lanes.start * size, self._lanes.stop * size)
            blocks.setdefault(number, {})[position] = values_N.view(-1, *shape).to(self._world.device)
        self._blocks = [
            tuple(of_block[position] for position in sorted(of_block)) for _, of_block in sorted(blocks.items())
        ] or None

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for number, block in enumerate(self._blocks or []):
            for position, tensor in enumerate(block):
                yield f"block_{number}.{position}", tensor
