"""Flags and records that the studies' command lines share: those that name a model, and the conditions of a figure."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from eval.bench import measure
from eval.scoring.models import DTYPES, CausalModel, load_model
from xlstm_lm.base.fields import Count, argument
from xlstm_lm.base.machine import version


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--batch-size, --device, --dtype, --library and --trained-context."""
    add = parser.add_argument
    add("--batch-size", type=positive, default=8, metavar="N", help="Rows in a batch. Default: 8.")
    add("--device", help="Default: cuda where there is one, else cpu.")
    add("--dtype", default="float32", choices=list(DTYPES), help="Default: float32.")
    add(
        "--library",
        default="auto",
        choices=["auto", "xlstm_lm", "transformers"],
        help="Who computes the model. Default: xlstm_lm for runs, checkpoints and xLSTM folders, else transformers.",
    )
    add(
        "--trained-context", type=positive, metavar="T", help="Tokens of a training row, where the folder does not say."
    )


def load_named_model(name: str, options: argparse.Namespace) -> CausalModel:
    """The model of a folder or hub id, with the flags of `add_model_flags`."""
    return load_model(
        name,
        library=options.library,
        device=options.device,
        dtype=options.dtype,
        trained_context=options.trained_context,
    )


positive = argument(Count)
"""An integer of at least 1, for argparse."""


def environment(device: torch.device, packages: tuple[str, ...]) -> dict[str, Any]:
    """The conditions of a measurement, with the versions of `packages`."""
    return measure.environment(device.type) | {name: version(name) for name in packages}
