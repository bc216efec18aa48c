"""`xlstm-lm import`: make a run of a model from elsewhere."""

from __future__ import annotations

import argparse
import shlex

from xlstm_lm.base import console


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, the folder of the run, and the tokenizer."""
    parser.add_argument(
        "--from",
        required=True,
        dest="source",
        metavar="PATH",
        help="A transformers folder of type xlstm, llama, mamba or mamba2; a state dict of the xlstm package with its "
        "configuration beside it; an export, a run or a checkpoint; or an id on the hub, such as NX-AI/xLSTM-7b.",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="A new folder, the run's.")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes, a folder, or an id on the Hugging Face hub. Default: the one in the model's folder.",
    )


def run(options: argparse.Namespace) -> None:
    """Import, and print the command that trains the model on."""
    from xlstm_lm.hub import import_run

    console.stage(f"importing {options.source}")
    recipe = shlex.quote(str(import_run(options.source, options.out, options.tokenizer)))
    console.end_stage()
    out = shlex.quote(options.out)
    print(f"Wrote {out}. Train it on:  xlstm-lm train --config RECIPE --config {recipe} --training.run_dir {out}")
