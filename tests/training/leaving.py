"""Leave right after a collective, while groups that torch does not destroy live on; a program for torchrun."""

from __future__ import annotations

import sys

import torch
import torch.distributed

from xlstm_lm.parallel.process_group import join_world

if __name__ == "__main__":
    world = join_world()
    kept = [torch.distributed.group.WORLD, torch.distributed.new_group()]  # as DeepSpeed does
    sys.kept = kept
    sys.setswitchinterval(5)  # nobody takes the interpreter's lock from the main thread on its way out
    for group in kept * 2:
        torch.distributed.all_reduce(torch.ones(10), group=group)
