"""Train the models of a study on a made-up task, and test them far beyond what they were trained on.

    python -m eval.tasks --config configs/tasks/parity.yaml --at-once 2 --out eval/results/parity.json

Every run is a process with one thread and the trainer of language models. Repeated, the command continues: finished
runs are reused, others resumed. The finished runs are tested, and the results printed and written, with a picture.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from eval.command import environment, positive
from eval.study.jobs import alone_in
from eval.study.results_file import results_file, write_results
from eval.tasks.rows import TaskData
from eval.tasks.study import Study, collect, load_study, train_runs
from eval.tasks.summary import as_markdown, draw, summarize
from xlstm_lm.base.fields import NonNegative, argument
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.program import program
from xlstm_lm.training.loop import train
from xlstm_lm.training.run_config import load_run_config

COMMAND = "python -m eval.tasks"
PACKAGES = ("xlstm-lm", "deepspeed", "numpy")


def main(arguments: list[str] | None = None) -> None:
    """Train a study's models, or one run; a user's mistake ends with code 2, runs that are missing with 1."""
    options = _parse(arguments)
    torch.set_flush_denormal(True)  # as in training
    with program(COMMAND):
        if options.run:
            _train_one(options.run)
            return
        folder = options.runs or Path("runs/tasks") / options.config.stem
        study = load_study(options.config, folder, options.only or ())
        with alone_in(folder):
            train_runs(study, options.at_once, options.max_minutes and 60 * options.max_minutes)
        missing = _report(study, options.out)
    sys.exit(1 if missing else 0)


def _train_one(recipe: Path) -> None:
    """Train, or resume, the run of a recipe with data.task."""
    run = load_run_config([recipe])
    train(run, TaskData(run.data))


def _report(study: Study, out: Path | None) -> bool:
    """Print and write the results of the finished runs; return whether any is missing."""
    found = collect(study)
    curves = summarize(found["runs"])
    if curves:
        print(f"\n{study.config.title}: scaled accuracy\n\n{as_markdown(curves, study.task)}")
    for each in found["missing"]:
        print(f"Missing: {each['run']}, {each['reason']}")
    if curves and out:
        content = {"environment": environment(torch.device("cpu"), PACKAGES), "study": asdict(study.config), **found}
        write_results(out, content)
        print(f"\nWrote {out}")
        picture = out.with_suffix(".png")
        if draw(curves, picture, study.task, study.config.title):
            print(f"Wrote {picture}")
    return bool(found["missing"])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="STUDY", help="a recipe of configs/tasks")
    what.add_argument(
        "--run", type=Path, metavar="RECIPE", help="train one run, such as its config.yaml to go on with it"
    )
    add("--only", nargs="+", metavar="MODEL", help="these models of the study")
    add("--at-once", type=positive, default=1, metavar="N", help="runs at once (default 1)")
    add("--max-minutes", type=argument(NonNegative), metavar="M", help="stop and save after so long; 0: report only")
    add("--runs", type=user_path, metavar="FOLDER", help="of the runs (default runs/tasks/STUDY)")
    add("--out", type=results_file, metavar="FILE", help="write the results to this JSON, and a PNG beside it")
    options = parser.parse_args(arguments)
    if options.run and (options.only or options.runs or options.out):
        parser.error("--run takes neither --only, --runs nor --out")
    return options


if __name__ == "__main__":
    main()
