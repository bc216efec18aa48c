"""Train on two ranks of which the last is slow, at ZeRO stages 0 and 3; a program for torchrun."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch.distributed

from tests.training.runs import configure
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.training import stragglers
from xlstm_lm.training.engine import TrainingModule
from xlstm_lm.training.loop import train

SLOWNESS = 0.15


def main(folder: Path) -> None:
    world = join_world()
    stragglers.socket.gethostname = lambda: f"node{world.rank}"
    stragglers.peak_memory_bytes = lambda device: 1000 + world.rank
    forward = TrainingModule.forward

    def slow(self, *arguments):
        if self.training and world.rank == world.size - 1:
            time.sleep(SLOWNESS)
        return forward(self, *arguments)

    TrainingModule.forward = slow
    for stage in (0, 3):
        zero = {"zero_optimization": {"stage": stage}}
        values = {"training__steps": 4, "training__validate_every": 0, "training__gate_statistics_every": 2}
        values |= {"training__run_dir": str(folder / f"stage{stage}"), "profile__steps": "2:3"}
        train(configure(folder, deepspeed=zero, **values))
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
