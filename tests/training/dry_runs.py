"""Dry runs of a tiny model on 256 processes, one for each argument STAGE:PRECISION or STAGE:PRECISION:SEQUENCE.

A program for one process. With SEQUENCE, that many processes divide rows of 64 tokens.
Prints the lines of each as JSON, and why a wrong section deepspeed is refused.
"""

from __future__ import annotations

import contextlib
import json
import sys

from xlstm_lm.training.dry_run import dry_run
from xlstm_lm.training.run_config import load_run_config

MODEL = {"vocab_size": 40, "embedding_dim": 16, "num_heads": 2, "num_blocks": 2, "pattern": ["mlstm", "slstm"]}


def fields(**overrides: object) -> dict[str, object]:
    """Dotted fields of a run of 512 rows."""
    return {
        **{f"model.{name}": value for name, value in MODEL.items()},
        "data.global_batch_size": 512,
        "data.context_length": 8,
        "training.micro_batch_size": 1,
        "training.precision": "bf16",
        "training.run_dir": "runs/never",
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }


if __name__ == "__main__":
    found = {}
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        for name in sys.argv[1:]:
            stage, precision, *sequence = name.split(":")
            section = {"zero_optimization": {"stage": int(stage), "reduce_bucket_size": 100000}}
            divided = {"training__sequence_parallel": int(sequence[0]), "data__context_length": 64} if sequence else {}
            run = load_run_config([], fields(deepspeed=section, training__precision=precision, **divided))
            found[name] = dry_run(run, 256)
        try:
            section = {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 6, "stage3_prefetch_bucket_size": 5}}
            dry_run(load_run_config([], fields(deepspeed=section)), 256)
        except ValueError as error:
            found["refused"] = str(error)
    print(json.dumps(found))
