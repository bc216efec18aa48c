"""Tables of Markdown, and those of a study of speed: each is measured once, even where the process dies, printed, and
kept in JSON."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from eval.bench.measure import DTYPES, Ceilings, clock, environment, measure_ceilings, one_line
from eval.study.journal import Journal
from eval.study.results_file import write_results


def markdown_table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table with the line `head`; a bar in a cell becomes a slash."""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)])


def ceilings_of_study(options: argparse.Namespace, journal: Journal) -> Ceilings:
    """The ceilings of this machine, measured and printed by the study's first process."""
    if "ceilings" not in journal.results:
        ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
        journal.done("ceilings", asdict(ceilings))
        journal.done("environment", environment(options.device))  # the checkout may change later
        print("\n".join(f"{name}: {value}" for name, value in journal.results["environment"].items()))
        copied, multiplied = ceilings.bytes_per_second / 1e9, ceilings.operations_per_second / 1e12
        print(f"Ceilings measured here: copy {copied:.4g} GB/s, {options.dtype} product {multiplied:.4g} TFLOP/s.")
    return Ceilings(**journal.results["ceilings"])


def go_through(
    tables: dict[str, Callable[[], list[Any]]],
    options: argparse.Namespace,
    journal: Journal,
    row_class: type,
    show: Callable[[list[Any]], str],
    **also: Any,
) -> list[Any]:
    """The rows of all tables. Those of one, of the dataclass `row_class`, are what the value at its title measures, and
    `show` makes text of them.

    No table is begun once the options' `budget` of seconds since `begin` is spent. The file, `out` (or None), has what
    is in `also` beside the rows.
    """
    rows: list[Any] = []
    left_out: list[str] = []

    def write() -> None:
        if options.out is None:
            return
        content = {name: journal.results[name] for name in ("environment", "ceilings")}
        if options.device == "cpu":
            content["clock"] = clock(options.device).__name__
        content |= also | {"rows": [asdict(row) for row in rows], "left_out": left_out}
        write_results(options.out, content)  # even where a kernel crashes

    for title, measure in tables.items():
        if title in journal.results:
            rows += (row_class(**each) for each in journal.results[title])
            continue
        if options.budget and time.time() - options.begin > options.budget:
            left_out.append(title)
            continue
        torch.manual_seed(0)
        try:
            found = measure()
        except torch.OutOfMemoryError as caught:  # of the inputs; a contender's own is in its row
            left_out.append(f"{title} ({one_line(caught)})")
            continue
        journal.done(title, [asdict(row) for row in found])
        rows += found
        print(f"\n{title}\n\n{show(found)}", flush=True)
        write()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if left_out:
        print(f"\nLeft out, for want of time (--budget {options.budget:g}) or memory: {'; '.join(left_out)}")
    write()
    return rows
