"""Sum over an axis of two of three processes, and over all; a program for torchrun."""

from __future__ import annotations

import torch
import torch.distributed

from xlstm_lm.parallel.process_group import Axis, join_world

if __name__ == "__main__":
    world = join_world()
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2])]
    pair, alone = Axis(rank=world.rank % 2, size=2, group=groups[0]), Axis(rank=0, size=1, group=groups[1])
    axis = alone if world.rank == 2 else pair
    sums = [int(each.sum_(torch.tensor([10**world.rank]))) for each in (axis, world.data, world)]
    found = world.gather((axis.rank, *sums))
    if world.is_first:
        print(found)
