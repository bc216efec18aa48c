"""Check a model's kernels on several ranks, with a slow mLSTM that tunes a launch; a program for torchrun.

Prints, for each rank: when its first call of the mLSTM began and its last one ended, in seconds of the machine's clock,
and its tuned launches.
"""

from __future__ import annotations

import json
import time

import torch

from xlstm_lm.models.xlstm_config import XLSTMConfig
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.mlstm.compiled import mlstm_compiled
from xlstm_lm.ops.mlstm.triton_launch import TUNED, Launch
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.training.kernel_check import check_kernels

if __name__ == "__main__":
    world = join_world()
    calls: list[tuple[float, float]] = []

    def slow(*inputs, **options):
        begin = time.monotonic()
        result = mlstm_compiled(*inputs, **options)
        time.sleep(0.2)
        TUNED.setdefault("walk", Launch(64, 64, 8, 1 + world.rank))
        TUNED.setdefault(f"found by {world.rank}", Launch(64, 64, 8, 1))
        calls.append((begin, time.monotonic()))
        return result

    MLSTM["compiled"].function = slow
    config = XLSTMConfig(vocab_size=32, embedding_dim=32, num_blocks=1)
    taken = check_kernels(config, world, torch.float32, 4)
    found = world.gather({"taken": taken["mlstm"], "begin": calls[0][0], "end": calls[-1][1], "tuned": TUNED})
    if world.is_first:
        print(json.dumps(found))
