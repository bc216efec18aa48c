"""`xlstm-lm checkpoint`: list, verify or merge checkpoints."""

from __future__ import annotations

import argparse
import shlex

from xlstm_lm.base import console
from xlstm_lm.base.fields import CountOrZero, argument


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the run, and what is done with its checkpoints."""
    parser.add_argument("run_dir", metavar="RUN", help="Folder of the run.")
    parser.add_argument("--verify", action="store_true", help="Compare the checksums of all files.")
    parser.add_argument(
        "--merge", type=argument(CountOrZero), metavar="STEP", help="Write the weights of this step to one file, --out."
    )
    parser.add_argument("--out", metavar="FILE", help="With --merge: a new safetensors file.")


def run(options: argparse.Namespace) -> None:
    """Print the table of checkpoints, or write the weights of one to a file."""
    from xlstm_lm.base.paths import user_path
    from xlstm_lm.runs.checkpoint_list import list_checkpoints, merge, table

    run_dir = user_path(options.run_dir)
    if (options.merge is None) != (options.out is None):
        raise ValueError("--merge STEP and --out FILE belong together: give both, or neither.")
    console.stage("reading checkpoints")
    if options.merge is not None:
        out = merge(run_dir, options.merge, user_path(options.out))
        console.end_stage()
        print(f"Wrote the weights of step {options.merge} to {shlex.quote(str(out))}.")
        return
    listed = list_checkpoints(run_dir, options.verify)
    console.end_stage()
    print(table(listed, options.verify))
    damaged = [each.step for each in listed if each.damage]
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(listed)} checkpoints are damaged: of step {', '.join(map(str, damaged))}."
        )
