"""`xlstm-lm train`: train a model, or run one step of a layout dry."""

from __future__ import annotations

import argparse

from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, argument
from xlstm_lm.base.program import told_once
from xlstm_lm.cli.conclusion import conclude
from xlstm_lm.cli.recipe import add_recipe_flags, overrides_of
from xlstm_lm.training.run_config import load_run_config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the recipes, the dry run, and a flag for each field of a run."""
    parser.usage = "xlstm-lm train --config RECIPE [--config RECIPE ...] [--dry-run N] [--section.field VALUE ...]"
    parser.add_argument(
        "--dry-run",
        type=argument(Count),
        metavar="N",
        help="Run one step as rank 0 of N processes that do not exist, print what it holds and sends, and end.",
    )
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Train, and print the result and what can be done with it."""
    overrides = overrides_of(options)
    try:
        run = load_run_config(options.config, overrides)
    except ValueError as error:
        raise error if console.is_first_on_machine() else told_once(error) from None
    console.stage("importing DeepSpeed")
    with console.libraries_quieted():
        from xlstm_lm.training.loop import train

        if options.dry_run is not None:
            from xlstm_lm.training.dry_run import dry_run

            for line in dry_run(run, options.dry_run):
                console.say(line)
            return
        run_dir = train(run)
    if console.is_first_process():
        conclude(run_dir, options.config, overrides)
