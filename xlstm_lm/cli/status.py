"""`xlstm-lm status`: where runs stand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from xlstm_lm.runs.overview import look_at, one_line, page
from xlstm_lm.runs.status import read_status, should_requeue
from xlstm_lm.runs.text_curve import can_write


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folders, and the question of launch scripts."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run; of several, each has one line.")
    parser.add_argument(
        "--requeue",
        action="store_true",
        help="Print whether the run should be started again, and why; exit with 0 if it should and 1 if not.",
    )


def run(options: argparse.Namespace) -> None:
    """Print a page about one run, a line about each of several, or whether to start one again."""
    folders = [Path(each) for each in options.runs]
    if options.requeue:
        if len(folders) > 1:
            raise ValueError(f"--requeue answers for one run, but there are {len(folders)}: give one folder.")
        look_at(folders[0])  # names a folder that holds no run
        again, reason = should_requeue(read_status(folders[0]))
        print(f"{'requeue' if again else 'no requeue'}: {reason}")
        raise SystemExit(0 if again else 1)
    if len(folders) > 1:
        for each in folders:
            print(one_line(look_at(each)))
    else:
        print(page(look_at(folders[0]), unicode=can_write(sys.stdout.encoding)))
