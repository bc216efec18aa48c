"""Kernels compared with their definitions at a model's own head sizes, as training checks them before its first step:
`python -m eval.bench.verify_models xlstm-1.3b mamba2-400m`."""

from __future__ import annotations

import argparse
import sys

import torch

from eval.bench.speed_models import parse_model
from xlstm_lm.base.fields import Count, argument
from xlstm_lm.base.program import program
from xlstm_lm.ops.operation import verify, why_not

OURS = (None, "triton")
"""Packages of the backends that count; those of others are passed over in training where they are wrong."""


@program("eval.bench.verify_models")
def main(arguments: list[str] | None = None) -> int:
    """Print a line for each kernel; 1 if one is wrong or does not run."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench.verify_models", description=main.__doc__)
    parser.add_argument("models", nargs="+", help="presets, or families with fields such as xlstm:num_heads=8")
    parser.add_argument("--rows", type=argument(Count), default=8, help="rows of a micro batch (default 8)")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda", 0) if on_gpu else torch.device("cpu"), torch.bfloat16
    wrong = 0
    for model in map(parse_model, options.models):
        uses = model.config.operations(options.rows)
        for operation, call in dict.fromkeys((use.operation, use.call(device, dtype)) for use in uses):
            for backend in operation.backends[:-1]:
                if backend.package in OURS and why_not(operation, backend, call) is None:
                    problem = verify(operation, backend.name, call)
                    wrong += problem is not None
                    print(f"{model.name}: {operation.name} / {backend.name} {call}: {problem or 'right'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
