"""`xlstm-lm flops`: account for a model, part by part."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xlstm_lm.base import console
from xlstm_lm.base.fields import Count, argument

if TYPE_CHECKING:
    from xlstm_lm.models.components import Component

CONTEXT = 2048
"""Tokens of a row where no recipe and no flag says how many."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, by recipe or by name, and the lengths that its FLOPs depend on."""
    parser.add_argument("--config", metavar="RECIPE", help="YAML recipe with a section model.")
    parser.add_argument("--model", metavar="PRESET", help="A model by name, in place of that of the recipe.")
    parser.add_argument(
        "--context",
        type=argument(Count),
        metavar="N",
        help=f"Tokens of a row, and before the token that is written. Default: the recipe's, or {CONTEXT:,}.",
    )
    parser.add_argument(
        "--chunk",
        type=argument(Count),
        metavar="N",
        help="Chunk length in which recurrent cells are counted. Default: the model's, or 64.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON in place of tables.")


def run(options: argparse.Namespace) -> None:
    """Print the tables, or the same numbers as JSON."""
    from xlstm_lm.models.accounting import model_config, totals
    from xlstm_lm.models.components import components
    from xlstm_lm.models.presets import preset

    if not options.config and not options.model:
        raise ValueError("give a recipe (--config FILE), a model by name (--model PRESET), or both.")
    config = preset(options.model) if options.model else model_config(options.config)
    context = options.context or (context_of_recipe(options.config) if options.config else CONTEXT)
    parts = components(config, context, chunk_length=options.chunk)
    console.end_stage()
    if options.json:
        listed = [dataclasses.asdict(part) for part in parts]
        print(json.dumps({"context_length": context, **totals(parts, context), "parts": listed}, indent=1))
        return
    print("\n".join(table(parts, context)))


def context_of_recipe(path: str) -> int:
    """Tokens of a row by a recipe.

    Raises:
        ValueError: the recipe gives no whole number above 0.
    """
    from xlstm_lm.base.recipe import read_recipe
    from xlstm_lm.data.config import DataConfig

    data = read_recipe(path)[0].get("data")
    context = data.get("context_length", DataConfig.context_length) if isinstance(data, dict) else CONTEXT
    if not isinstance(context, int) or context < 1:
        raise ValueError(f"{path}: data.context_length is {context!r}; it must be a whole number of tokens above 0.")
    return context


def table(parts: Sequence[Component], context: int) -> list[str]:
    """Lines of the tables: a row a part, then the totals.

    Args:
        parts: The model's `components`.
        context: Tokens of a row.
    """
    from xlstm_lm.models.accounting import totals

    found = totals(parts, context)
    forward = found["inference_flops_per_token"]
    heads = f"{'parameters':>16}{'FLOPs a token':>16}{'share':>8}{'kept':>10}{'step FLOPs':>14}{'state bytes':>14}"
    lines = [f"{'part':<30}{heads}"]
    for part in parts:
        name = f"{part.block}: {part.name}" if part.block else part.name
        share = f"{part.flops / forward:.1%}"
        step, state = f"{part.step_flops:,.0f}", f"{part.state_bytes:,}"
        kept = f"{part.kept_bytes:,.0f}"
        lines.append(f"{name:<30}{part.parameters:>16,}{part.flops:>16,.0f}{share:>8}{kept:>10}{step:>14}{state:>14}")
    row = f"a row of {context:,} tokens"
    per_parameter = found["training_flops_per_token"] / found["parameters"]
    return [
        *lines,
        "",
        f"Parameters: {found['parameters']:,}; {found['parameters_without_embedding']:,} without the embedding, "
        f"{found['parameters_without_embedding_and_head']:,} without embedding and head.",
        f"Training, in {row}: {found['training_flops_per_token']:.4e} FLOPs a token, "
        f"{found['training_flops_per_row']:.4e} a row, {per_parameter:.2f} a parameter and token.",
        f"Kept for the backward pass: {found['kept_bytes_per_token']:,.0f} bytes a token on a GPU in bf16, without "
        "activation checkpointing.",
        f"Inference: {forward:.4e} FLOPs a token and {found['inference_flops_per_row']:.4e} to read {row}; "
        f"{found['step_flops']:.4e} for one more token.",
        f"State after {row}: {found['state_bytes']:,} bytes a sequence. A step that writes one token of one sequence "
        f"moves {found['step_traffic_bytes']:,} bytes.",
        "Counted: products of (m, k) and (k, n) as 2 m k n, the causal half of attention and of chunks, backward as "
        "twice forward. Not counted: embedding look-ups, norms, activations, skips, soft caps. Weights and "
        "activations in 2 bytes, cell states in 4.",
    ]
