"""`xlstm-lm doctor`: examine this machine."""

from __future__ import annotations

import argparse

from xlstm_lm.base import console


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the types of numbers to check kernels in."""
    parser.add_argument(
        "types",
        nargs="*",
        metavar="TYPE",
        help="float32, bfloat16 or float16: check kernels in these. Default: that of training here, and float32.",
    )


def run(options: argparse.Namespace) -> None:
    """Print the report of the machine."""
    from xlstm_lm.doctor import main

    console.end_stage()
    main(options.types)
