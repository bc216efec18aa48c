"""Scaling laws: fit the losses of many runs.

python -m eval.scaling_laws fit runs.csv --out fit.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.scaling_laws.fits import FitOptions, fit_table
from eval.scaling_laws.points import read_points
from eval.scaling_laws.summary import as_markdown
from eval.study.results_file import results_file, write_results
from xlstm_lm.base.fields import Count, CountOrZero, argument
from xlstm_lm.base.program import program

COMMAND = "python -m eval.scaling_laws"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; a user's mistake ends with code 2."""
    options = _parse(arguments)
    with program(COMMAND):
        options.act(options)


def _fit(options: argparse.Namespace) -> None:
    choices = FitOptions(
        form=options.form, objective=options.objective, samples=options.samples, hold_out=options.hold_out
    )
    fits = fit_table(read_points(options.table), choices)
    print(as_markdown(fits))
    if options.out:
        write_results(options.out, fits.as_json())
        print(f"Wrote {options.out}")


def _hold_out(text: str) -> int:
    """Number of points in the value of --hold-out, such as largest:1."""
    kind, _, count = text.partition(":")
    if kind != "largest":
        raise argparse.ArgumentTypeError(f"{text} must be largest:COUNT, such as largest:1")
    return int(argument(Count)(count))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
