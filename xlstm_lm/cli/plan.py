"""`xlstm-lm plan`: memory, traffic, time and money of a run, before it is started."""

from __future__ import annotations

import argparse

from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, Positive, PositiveRatio, argument
from xlstm_lm.cli.recipe import add_recipe_flags, overrides_of
from xlstm_lm.training.run_config import load_run_config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the recipes, the machines, and a flag for each field of a run."""
    parser.usage = (
        "xlstm-lm plan --config RECIPE [--config RECIPE ...] --gpus N --device TYPE [--mfu SHARE] [--price P] "
        "[--section.field VALUE ...]"
    )
    parser.add_argument("--gpus", type=argument(Count), required=True, metavar="N", help="Number of GPUs of the run.")
    parser.add_argument("--device", required=True, metavar="TYPE", help="Type of GPU: h100, a100, 'rtx 4090', ...")
    parser.add_argument(
        "--mfu",
        type=argument(PositiveRatio),
        default=0.4,
        metavar="SHARE",
        help="Share of the peak that a run reaches, as mfu in metrics.jsonl. Default: 0.4.",
    )
    parser.add_argument("--price", type=argument(Positive), metavar="P", help="Price of a GPU for an hour.")
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    from xlstm_lm.training.plan import Assumptions, make_plan
    from xlstm_lm.training.plan_page import page

    configured = load_run_config(options.config, overrides_of(options))
    assumed = Assumptions(mfu=options.mfu, price=options.price)
    found = make_plan(configured, options.gpus, options.device, assumed)
    console.end_stage()
    print("\n".join(page(found)))
