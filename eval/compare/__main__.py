"""`python -m eval.compare --config configs/compare/NAME.yaml`: train or reuse the runs, measure, write the report.

It can be stopped at any time and then continued. The exit code is 0 when all is done, 1 when something failed, 2 on a
user's mistake and 3 when work is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from eval.command import positive
from eval.compare.collect import collect, command
from eval.compare.config import check_data, load_comparison
from eval.compare.measure import measure_all, speeds_left, to_test
from eval.compare.report.write import write_report
from eval.compare.runs import Runs, is_chosen, to_train, train_all
from eval.study.engine import Grid, examine
from eval.study.jobs import Outcome, alone_in
from xlstm_lm.base.errors import some_of
from xlstm_lm.base.fields import NonNegative, argument
from xlstm_lm.base.outputs import check_folder_of_runs
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.program import program
from xlstm_lm.models.accounting import count_parameters

DONE, FAILED, UNFINISHED = 0, 1, 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the work that the options name, print the rest of it, and exit."""
    options = _parse(arguments)
    with program("eval.compare"):
        comparison = load_comparison(options.config, options.data_root)
        if options.at_once:
            comparison = dataclasses.replace(
                comparison, config=dataclasses.replace(comparison.config, at_once=options.at_once)
            )
        runs = Runs(comparison, options.out or Path("runs") / "compare" / comparison.config.name)
        check_folder_of_runs(runs.out)
        runs.check_folders()
        if options.stage != "report":
            check_data(comparison)
        _check_patterns(runs, options.only)
        if options.dry_run:
            _show_plan(runs, options.only)
            return
        outcomes = {}
        if options.stage != "report":  # a comparison that is under way can be looked at
            with alone_in(runs.out):
                outcomes = _work(runs, options)
        if options.stage in ("report", "all"):
            for path in write_report(collect(runs), runs.out):
                print(f"Wrote {path}")
    sys.exit(_conclude(runs, outcomes, options))


def _work(runs: Runs, options: argparse.Namespace) -> dict[str, Outcome]:
    """Train and measure until the time limit."""
    begin, at_once = time.monotonic(), runs.comparison.config.at_once
    outcomes: dict[str, Outcome] = {}

    def left() -> float | None:
        return None if options.max_minutes is None else 60 * options.max_minutes - (time.monotonic() - begin)

    if options.stage in ("train", "all"):
        outcomes |= train_all(runs, options.only, at_once=at_once, launch=options.launch, max_seconds=left())
    if options.stage in ("measure", "all") and not any(each.asked_to_stop for each in outcomes.values()):
        outcomes |= measure_all(runs, options.only, at_once=at_once, max_seconds=left())
    return outcomes


def _conclude(runs: Runs, outcomes: dict[str, Outcome], options: argparse.Namespace) -> int:
    """Print failures and remaining work with the command that continues; return the exit code."""
    failed = [name for name, outcome in outcomes.items() if outcome.code and not outcome.asked_to_stop]
    left = [run.name for run in to_train(runs, options.only)]
    more = len(runs.comparison.config.seeds) - 1
    unknown = [name for name, grid in runs.grids.items() if grid.best is None and not _all_diverged(grid)]
    left += [f"{more} more seeds of {name}" for name in unknown if more and not options.only]
    if options.stage != "train":
        left += [f"test of {run.name}" for run in to_test(runs, options.only)]
        left += [f"{kind} speed" for kind in speeds_left(runs)]
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    if not left:
        print(f"Nothing is left to do of stage {options.stage}.")
        return FAILED if failed else DONE
    again = command(runs.comparison, runs)
    again += ["--stage", options.stage] if options.stage in ("train", "measure") else []
    for name in ("only", "max_minutes", "at_once", "data_root", "launch"):
        value = getattr(options, name)
        if value:
            values = [shlex.join(value)] if name == "launch" else value if isinstance(value, list) else [value]
            again += [f"--{name.replace('_', '-')}", *map(str, values)]
    print(f"Left to do: {some_of(left, 12)}.\nGo on with:  {shlex.join(again)}")
    return FAILED if failed else UNFINISHED


def _all_diverged(grid: Grid) -> bool:
    return all(examine(run).status == "diverged" for run in grid.tuning)


def _show_plan(runs: Runs, only: Sequence[str]) -> None:
    """Print the state of every run and the work that is left."""
    config = runs.comparison.config
    for model in runs.models:
        grid = runs.grids[model.name]
        run = grid.runs[0]
        parameters = count_parameters(run.config.model)
        print(f"{model.name} ({model.label}): {parameters:,} parameters, {run.tokens:,} tokens a run")
        for each in grid.needed:
            if is_chosen(each, only):
                state = examine(each)
                print(f"  {each.name}: {state.status}{f', {state.problem}' if state.problem else ''}")
        if grid.best is None:
            print(f"  then seeds {', '.join(map(str, config.seeds[1:])) or 'none'} at the best of these learning rates")
    print(
        f"Now to train: {len(to_train(runs, only))} runs, {config.at_once} at once; to test: "
        f"{len(to_test(runs, only))}; speed to measure: {', '.join(speeds_left(runs)) or 'none'}."
    )


def _check_patterns(runs: Runs, only: Sequence[str]) -> None:
    """Refuse a pattern that matches no run of any seed."""
    known = [run for grid in runs.grids.values() for run in grid.runs]
    for pattern in only:
        if not any(is_chosen(run, [pattern]) for run in known):
            names = ", ".join(model.name for model in runs.models)
            raise ValueError(f"--only {pattern}: no run is called so. Models are {names}; a run is {known[0].name}.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="A comparison, such as configs/compare/smoke.yaml.")
    add("--out", type=user_path, metavar="FOLDER", help="Default: runs/compare/NAME.")
    add("--at-once", type=positive, metavar="N", help="Runs at a time. Default: what the comparison says.")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="Only these models or runs, such as 'mamba2-*'.")
    add("--stage", default="all", choices=["train", "measure", "report", "all"], help="Default: all, in this order.")
    add(
        "--max-minutes",
        type=argument(NonNegative),
        metavar="M",
        help="After so long begin nothing more, and let what runs save.",
    )
    add("--data-root", metavar="FOLDER", help="Where the comparison's local data lie, if not where it says.")
    add(
        "--launch",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help="What starts a training run, such as 'torchrun --nproc-per-node 8 -m'. Default: this Python.",
    )
    add("--dry-run", action="store_true", help="Check everything and show what would be done.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
