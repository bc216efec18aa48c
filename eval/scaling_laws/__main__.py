"""Scaling laws: fit the losses of many runs.

python -m eval.scaling_laws fit runs.csv --out fit.json
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from eval.command import environment, positive
from eval.scaling_laws.bootstrap import LEVEL
from eval.scaling_laws.collect import collect, configured_flops
from eval.scaling_laws.cost import cost_as_markdown
from eval.scaling_laws.design import Designer, DesignOptions, Span
from eval.scaling_laws.designed import FORECASTS, read_design, write_design
from eval.scaling_laws.fits import FitOptions, fit_table, read_fits
from eval.scaling_laws.forecast import complete, register
from eval.scaling_laws.points import holds_points, read_points, write_points
from eval.scaling_laws.rates import fit_rates
from eval.scaling_laws.report import write_report
from eval.scaling_laws.summary import as_markdown
from eval.scaling_laws.work import Work
from eval.study.results_file import results_file, write_results
from xlstm_lm.base.errors import some_of
from xlstm_lm.base.fields import Count, CountOrZero, NonNegative, Positive, Share, argument
from xlstm_lm.base.paths import user_path
from xlstm_lm.base.program import program
from xlstm_lm.training.schedule import CooldownShape

COMMAND = "python -m eval.scaling_laws"
DONE, FAILED, UNFINISHED = 0, 1, 3
"""Exit codes: all is done; a run failed; runs are left."""
PACKAGES = ("numpy", "scipy")
"""Packages whose versions fit.json records."""
PASSED_ON = (
    *("mode", "budgets", "sizes", "tokens", "tokens_per_parameter", "center", "grid", "cooldown", "cooldown_shape"),
    *("seeds", "check", "lr_sweep", "force"),
)
"""Flags of design that are fields of DesignOptions; None leaves the default."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit; a failed run ends with code 1, a user's mistake with 2, work left with 3."""
    options = _parse(arguments)
    with program(COMMAND):
        code = options.act(options)
    sys.exit(code)


def _fit(options: argparse.Namespace) -> int:
    choices = FitOptions(
        form=options.form, objective=options.objective, samples=options.samples, hold_out=options.hold_out
    )
    fits = fit_table(read_points(options.table, configured_flops), choices)
    print(as_markdown(fits))
    if options.out:
        write_results(options.out, {"environment": environment(torch.device("cpu"), PACKAGES), **fits.as_json()})
        print(f"Wrote {options.out}")
    return DONE


def _design(options: argparse.Namespace) -> int:
    rates = {}
    if options.rates:
        table = read_points(options.rates)
        rates = {name: fit_rates(table.of(name)) for name in table.architectures}
    choices = DesignOptions(
        architectures=[name for text in options.architecture for name in text.split(",")],
        recipes=options.config,
        out=options.out,
        rates=rates,
        **{name: getattr(options, name) for name in PASSED_ON if getattr(options, name) is not None},
    )
    designer = Designer(choices)
    design = designer.design()
    print(cost_as_markdown(design, options.flops_per_second))
    for name, law in rates.items():
        for note in law.notes:
            print(f"{name}: {note}")
    if not options.dry_run:
        for path in write_design(design, designer.configs):
            print(f"Wrote {path}")
    return DONE


def _run(options: argparse.Namespace) -> int:
    work = Work(read_design(options.design))
    if options.dry_run:
        print(work.as_text())
        return DONE
    seconds = None if options.max_minutes is None else 60 * options.max_minutes
    outcomes = work.train(at_once=options.at_once, launch=options.launch, max_seconds=seconds)
    failed = [name for name, outcome in outcomes.items() if outcome.code and not outcome.asked_to_stop]
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    for run in work.lost:
        print(f"{run.run} cannot begin: {run.trunk} is over ({work.state(work.design.named(run.trunk)).status}).")
    left = [run.run for run in work.left]
    if left:
        print(f"Left to do: {some_of(left, 12)}.\nGo on with:  {COMMAND} run {options.design}")
    else:
        print(f"Nothing is left of the {len(work.planned)} runs.")
    return FAILED if failed else UNFINISHED if left else DONE


def _collect(options: argparse.Namespace) -> int:
    points, missing = collect(options.sources)
    for text in missing:
        print(f"Missing: {text}")
    if not points:
        raise ValueError(f"No run of {', '.join(map(str, options.sources))} is over yet: nothing to collect.")
    write_points(points, options.out)
    print(f"Wrote {options.out} with {len(points)} points")
    for path in (source / FORECASTS for source in options.sources):
        for each in complete(path):
            measured = "not measured yet" if each.measured is None else f"measured {each.measured:.4f}"
            print(f"{each.run}: forecast {each.predicted:.4f} ({each.low:.4f} to {each.high:.4f}), {measured}")
    return UNFINISHED if missing else DONE


def _forecast(options: argparse.Namespace) -> int:
    found, notes = register(options.fit, options.run, options.architecture, options.out)
    print(
        f"{found.run}: {found.predicted:.4f} nats a token, {LEVEL:.0%} interval {found.low:.4f} to {found.high:.4f}, "
        f"at {found.times_largest:.3g} times the largest fitted FLOPs. Written to {options.out}."
    )
    for text in notes:
        print(text)
    return DONE


def _report(options: argparse.Namespace) -> int:
    fits = read_fits(options.fit)
    forecasts = complete(options.forecasts) if options.forecasts else []
    for path in write_report(fits, forecasts, options.out):
        print(f"Wrote {path}")
    return DONE


def _hold_out(text: str) -> int:
    """Number of points in the value of --hold-out, such as largest:1."""
    kind, _, count = text.partition(":")
    if kind != "largest":
        raise argparse.ArgumentTypeError(f"{text} must be largest:COUNT, such as largest:1")
    return int(argument(Count)(count))


def _points_file(text: str) -> Path:
    """A place for a table of loss points, which may replace another one but no other file."""
    path = user_path(text)
    if path.is_dir() or (path.exists() and not holds_points(path)):
        raise argparse.ArgumentTypeError(f"{path} exists and is no table of collected runs; choose another file")
    return path


def _span(text: str) -> Span:
    """Numbers in equal ratios from LOW:HIGH:COUNT, such as 150k:1.2m:4."""
    parts = text.lower().split(":")
    try:
        low, high = (float(part[:-1]) * UNITS[part[-1]] if part[-1:] in UNITS else float(part) for part in parts[:2])
        span = Span(low, high, int(parts[2]))
    except (ValueError, IndexError):
        span = None
    if span is None or len(parts) != 3 or not 0 < span.low <= span.high < math.inf or span.count < 1:
        raise argparse.ArgumentTypeError(f"{text} must be LOW:HIGH:COUNT, such as 150k:1.2m:4 or 1e16:1e19:4")
    return span


UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def _speed(text: str) -> float:
    """A positive number of FLOPs a second, such as 4e14."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0, such as 4e14")
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_design(commands)
    _add_run_and_collect(commands)
    _add_fit(commands)
    _add_forecast_and_report(commands)
    return parser.parse_args(arguments)


def _add_design(commands: Any) -> None:
    design = commands.add_parser("design", help="write the runs of a ladder, a grid or a sweep, and print their cost")
    design.set_defaults(act=_design)
    add = design.add_argument
    add(
        "--config",
        nargs="+",
        type=Path,
        required=True,
        metavar="RECIPE",
        help="data, batch, optimizer; the model is replaced",
    )
    add(
        "--architecture",
        nargs="+",
        required=True,
        metavar="NAME[=PRESET]",
        help="such as xlstm, or mine=xlstm-cpu-0.7m",
    )
    add("--out", type=user_path, required=True, metavar="DIR", help="folder of the design and of its runs")
    add("--mode", choices=["ladder", "isoflop"], help="default: ladder")
    add("--budgets", type=_span, metavar="LOW:HIGH:COUNT", help="FLOPs of the grids, or of the ladder's sizes")
    add("--sizes", type=_span, metavar="LOW:HIGH:COUNT", help="parameters of a ladder's sizes, such as 150k:1.2m:4")
    add("--tokens", type=_span, metavar="LOW:HIGH:COUNT", help="tokens of each size's branches")
    add("--tokens-per-parameter", type=_span, metavar="LOW:HIGH:COUNT", help="in place of --tokens; default: 5:40:4")
    add(
        "--center",
        type=argument(Positive),
        metavar="RATIO",
        help="tokens a parameter at a budget's center; default: 20",
    )
    add(
        "--grid",
        type=_span,
        metavar="LOW:HIGH:COUNT",
        help="sizes of an IsoFLOP grid over its center; default: 0.5:2:5",
    )
    add("--cooldown", type=argument(Share), metavar="SHARE", help="of a run's steps; default: 0.2")
    add("--cooldown-shape", choices=get_args(CooldownShape), help="default: the recipe's schedule.cooldown_shape")
    add("--seeds", type=positive, metavar="N", help="at the smallest size with the fewest tokens; default: 1")
    add("--no-check", dest="check", action="store_false", help="train no branch's run straight through for comparison")
    add(
        "--lr-sweep", type=argument(Count), metavar="N", help="N learning rates at the two smallest sizes, nothing else"
    )
    add("--rates", type=Path, metavar="RUNS.csv", help="collected sweep, whose best rates the sizes follow")
    add("--force", action="store_true", help="allow sizes over 30 times the largest of the sweep")
    add("--flops-per-second", type=_speed, metavar="N", help="of one device, to print hours")
    add("--dry-run", action="store_true", help="print the cost and write nothing")


def _add_run_and_collect(commands: Any) -> None:
    run = commands.add_parser("run", help="train the runs of a design; repeated, it goes on")
    run.set_defaults(act=_run)
    add = run.add_argument
    add("design", type=user_path, metavar="DIR", help="folder of design")
    add("--at-once", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--max-minutes", type=argument(NonNegative), metavar="M", help="stop and save after so long")
    add("--launch", type=shlex.split, default=[], metavar="COMMAND", help="such as 'torchrun --nproc-per-node 8 -m'")
    add("--dry-run", action="store_true", help="list the state of every run")
    collect_ = commands.add_parser("collect", help="write the loss points of runs to a table")
    collect_.set_defaults(act=_collect)
    add = collect_.add_argument
    add("sources", nargs="+", type=user_path, metavar="SOURCE", help="designs, run folders or tables")
    add("--out", type=_points_file, required=True, metavar="RUNS.csv")


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser("fit", help="fit loss surfaces and parabolas to a table of runs")
    fit.set_defaults(act=_fit)
    add = fit.add_argument
    add("table", type=Path, metavar="RUNS.csv", help="a row a loss, as collect writes it; N, D, C and L will do")
    add(
        "--form",
        choices=["chinchilla", "gamma", "isoflop"],
        default="chinchilla",
        help="E + A N^-alpha + B D^-beta, with an exponent gamma around both terms, or parabolas (default: chinchilla)",
    )
    add(
        "--objective",
        choices=["vpnls", "huber"],
        default="vpnls",
        help="the fit that the frontier uses; both are shown",
    )
    add("--samples", type=argument(CountOrZero), default=200, metavar="N", help="for intervals; 0: none (default: 200)")
    add("--hold-out", type=_hold_out, default=0, metavar="largest:N", help="predict the N largest from the others")
    add("--out", type=results_file, metavar="FILE", help="write fit.json, which forecast and report read")


def _add_forecast_and_report(commands: Any) -> None:
    forecast = commands.add_parser("forecast", help="register the expected loss of a run before it exists")
    forecast.set_defaults(act=_forecast)
    add = forecast.add_argument
    add("fit", type=Path, metavar="FIT.json")
    add("--run", type=Path, required=True, metavar="RECIPE", help="the run's recipe; its folder must not exist yet")
    add("--architecture", metavar="NAME", help="as the fit calls it; needed where it has several")
    add("--out", type=user_path, required=True, metavar="FORECAST.csv", help="file that the forecast is appended to")
    report = commands.add_parser("report", help="write a page with the fits, forecasts and pictures")
    report.set_defaults(act=_report)
    add = report.add_argument
    add("fit", type=Path, metavar="FIT.json")
    add("--forecasts", type=user_path, metavar="FORECAST.csv", help="losses of finished runs are entered")
    add("--out", type=user_path, required=True, metavar="FOLDER", help="of report.md and its pictures")


if __name__ == "__main__":
    main()
