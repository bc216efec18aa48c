"""Lose a process in front of a collective; a program for torchrun, which sees both end well."""

from __future__ import annotations

import os

import torch

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.parallel.process_group import join_world, lost_processes_explained

if __name__ == "__main__":
    world = join_world()
    world.sum_(torch.ones(1))
    if world.rank == 1:
        os._exit(0)
    try:
        with lost_processes_explained(world):
            for _ in range(100):
                world.sum_(torch.ones(1))
    except RunError as error:
        print(f"RunError: {error}", flush=True)
    os._exit(0)
