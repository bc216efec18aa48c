"""What the studies' command lines share: how they end on a user's mistake, and the flags that name a model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eval import measure
from eval.models import DTYPES
from xlstm_lm.base.fields import Count, argument
from xlstm_lm.base.machine import first_line, is_out_of_memory


@contextmanager
def one_message(command: str) -> Iterator[None]:
    """End with exit code 2 and one message on a user's mistake; XLSTM_LM_TRACEBACK=1 shows where it comes from."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("XLSTM_LM_TRACEBACK"):
            raise
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or os.environ.get("XLSTM_LM_TRACEBACK"):
            raise
        remedy = "lower --batch-size, close other programs, or use a machine with more"
        print(f"{command}: out of memory: {remedy}. ({first_line(error)})", file=sys.stderr)
        sys.exit(1)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--batch-size, --device, --dtype, --library and --trained-context."""
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="Rows in a batch. Default: 8.")
    parser.add_argument("--device", help="Default: cuda where there is one, else cpu.")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="Default: float32.")
    parser.add_argument(
        "--library",
        default="auto",
        choices=["auto", "xlstm_lm", "transformers"],
        help="Who computes the model. Default: xlstm_lm for runs, checkpoints and xLSTM folders, else transformers.",
    )
    parser.add_argument(
        "--trained-context", type=positive, metavar="T", help="Tokens of a training row, where the folder does not say."
    )


positive = argument(Count)
"""An integer of at least 1, for argparse."""


def environment(device: torch.device, packages: tuple[str, ...]) -> dict[str, Any]:
    """What a figure was measured with, the versions of `packages` included."""
    return measure.environment(device.type) | {name: measure.version(name) for name in packages}
