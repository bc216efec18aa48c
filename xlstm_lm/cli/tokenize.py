"""`xlstm-lm tokenize`: turn the documents of a recipe into files of token ids."""

from __future__ import annotations

import argparse
import os
import shlex
import time

from xlstm_lm.base import console
from xlstm_lm.base.fields import Size, argument


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the recipes, the folder and the number of processes."""
    parser.add_argument(
        "--config", action="append", required=True, metavar="RECIPE", help="YAML recipe; given again, later ones win."
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="Folder of the ids; an interrupted one goes on.")
    parser.add_argument(
        "--processes",
        type=argument(Size),
        metavar="N",
        help="Processes that tokenize, a file each. Default: the processors that this process may use.",
    )
    parser.add_argument(
        "--deduplicate", action="store_true", help="Leave out documents whose text an earlier one of the source has."
    )
    parser.add_argument(
        "--pieces",
        type=argument(Size),
        metavar="CHARACTERS",
        help="Cut training documents at ends of lines into pieces of at most so many characters, each a document from "
        "there on. Default: whole documents.",
    )


def run(options: argparse.Namespace) -> None:
    """Tokenize, and print statistics and the flags that use the ids."""
    from xlstm_lm.base.paths import user_path
    from xlstm_lm.data.tokenize_sources import DATA_RECIPE, tokenize
    from xlstm_lm.training.run_config import load_data_config

    config, has_model = load_data_config(options.config)
    if config.task is not None:
        raise ValueError("data.task has made-up rows and no documents: there is nothing to tokenize.")
    out = user_path(options.out)
    processes = options.processes or len(os.sched_getaffinity(0))
    console.stage("tokenizing")
    begin = time.monotonic()
    statistics = tokenize(
        config,
        out,
        processes=processes,
        deduplicate=options.deduplicate,
        piece_characters=options.pieces,
        report=console.say,
    )
    seconds = time.monotonic() - begin
    console.end_stage()
    for name, each in statistics.items():
        print(f"{out / name}:")
        print("\n".join(f"  {line}" for line in each.lines()))
    recipes = " ".join(f"--config {shlex.quote(recipe)}" for recipe in (*options.config, str(out / DATA_RECIPE)))
    model = "" if has_model else " --model PRESET"
    print(f"Took {seconds:,.0f} s on {processes} processes. Train on the ids:  xlstm-lm train {recipes}{model}")
