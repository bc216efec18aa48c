"""Flags of the commands that read a run from recipes."""

from __future__ import annotations

import argparse
from typing import Any

from xlstm_lm.training.run_config import add_field_flags


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the recipes, and a flag for each field of a run."""
    parser.add_argument(
        "--config", action="append", required=True, metavar="RECIPE", help="YAML recipe; given again, later ones win."
    )
    add_field_flags(parser)


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of a run that flags give, by their dotted names."""
    return {name: value for name, value in vars(options).items() if "." in name or name in ("model", "deepspeed")}
