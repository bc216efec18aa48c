"""Dry runs of a small model on 256 processes at each ZeRO stage, and what the plan says of them; a program.

Prints, for each stage, the lines of the dry run, the planned collectives, and the planned bytes that are held, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys

from xlstm_lm.training.dry_run import dry_run
from xlstm_lm.training.plan import Assumptions, make_plan
from xlstm_lm.training.run_config import load_run_config

if __name__ == "__main__":
    found = {}
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        for stage in range(4):
            zero = {"stage": stage, "reduce_bucket_size": 100_000, "overlap_comm": False}
            fields = {
                "model": {"vocab_size": 400, "embedding_dim": 64, "num_heads": 2, "num_blocks": 2},
                "data.global_batch_size": 512,
                "data.context_length": 8,
                "training.micro_batch_size": 1,
                "training.precision": "bf16" if stage else "fp32",
                "deepspeed": {"zero_optimization": zero},
            }
            run = load_run_config([], fields)
            plan = make_plan(run, 256, "h100", Assumptions())
            held = plan.configured.memory.held
            collectives = [each._asdict() for each in plan.collectives]
            found[stage] = {"lines": dry_run(run, 256), "collectives": collectives, "held": held}
    print(json.dumps(found))
