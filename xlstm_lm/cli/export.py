"""`xlstm-lm export`: write a trained model for transformers."""

from __future__ import annotations

import argparse
import shlex

from xlstm_lm.base import console
from xlstm_lm.base.fields import CountOrZero, argument


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the source, the form of the export, and the fields of CardOptions."""
    parser.add_argument(
        "--run", required=True, dest="source", metavar="FOLDER", help="A run or one of its checkpoints."
    )
    parser.add_argument(
        "--step", type=argument(CountOrZero), metavar="N", help="Step of the run's checkpoint. Default: the newest."
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="A new folder.")
    parser.add_argument(
        "--format",
        choices=["transformers", "xlstm_lm"],
        help="transformers: a model type that is part of transformers; xlstm_lm: any model, with padded prompts, beams "
        "and bf16, and with its code in the folder. Default: transformers, if it can hold the model.",
    )
    parser.add_argument(
        "--shard-size", default="4GiB", metavar="SIZE", help="Largest file of weights, such as 500MB. Default: 4GiB."
    )
    parser.add_argument("--push", metavar="REPO", help="Also put it on the Hugging Face hub, as somebody/my-model.")
    parser.add_argument(
        "--license", metavar="NAME", help="Of the weights, for the model card: apache-2.0, cc-by-4.0, ... or other."
    )
    parser.add_argument(
        "--license-name", metavar="NAME", help="With --license other: its name, such as my-license-1.0."
    )
    parser.add_argument("--license-link", metavar="URL", help="With --license other: where its text is.")
    parser.add_argument(
        "--language", nargs="+", default=[], metavar="CODE", help="Of the training data, as ISO 639 codes: en de."
    )
    parser.add_argument(
        "--base-model",
        metavar="REPO",
        help="Id on the hub of the model that was tuned. Default: the one that the run was imported from.",
    )


def run(options: argparse.Namespace) -> None:
    """Export, and print how the export was checked and can be used."""
    from xlstm_lm import hub
    from xlstm_lm.hub.card_metadata import CardOptions
    from xlstm_lm.hub.export import parse_size

    card = CardOptions(
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        languages=tuple(options.language),
        base_model=options.base_model,
    )
    exported = hub.export(
        options.source,
        options.out,
        step=options.step,
        format_name=options.format,
        shard_bytes=parse_size(options.shard_size),
        repository=options.push,
        card=card,
    )
    console.end_stage()
    form = exported.export_format
    print(f"Wrote {exported.folder} in the format {form.name}, which suits {form.suits}.")
    for limit in form.limits:
        print(f"  {limit}")
    print(f"A fresh process gave the trained model's logits (largest difference {exported.difference:.1e}) and texts.")
    if not card.license:
        print("The model card names no license of the weights; --license adds one (apache-2.0, cc-by-4.0, ...).")
    if exported.address:
        print(f"Pushed to {exported.address}")
    print(f"Try it:  xlstm-lm generate --model {shlex.quote(str(exported.folder))} --prompt 'def '")
