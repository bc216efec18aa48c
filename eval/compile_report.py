"""Compile our GPU kernels without a GPU and report registers, shared memory, spills and matrix instructions.

`python -m eval.kernels --compile-report` compiles every configuration that we ship (`compile_cases.CASES`) for every
target; `python -m eval.compile_report --help` names ways to compile fewer. It ends with 1 if a kernel does not compile,
needs more shared memory than there is, or spills registers where that must not be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.bench.compile_calls import CudaCall, TritonCall
from eval.bench.compile_cases import CASES
from eval.study.results_file import results_file, write_results
from xlstm_lm.base.machine import assembler, environment
from xlstm_lm.base.program import program
from xlstm_lm.ops.gpu import ARCHITECTURES, KIB

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
"""The architectures that are compiled for unless others are named."""
NEVER_SPILL = ("sm_90", "sm_100")
"""Targets on which no kernel may keep a register's content in device memory."""
SPILL_LIMIT = 128
"""Bytes a thread that a kernel may keep there elsewhere. On sm_80, 22 of 457 kernels do, 96 bytes at most
(`--summary eval/results/compile-report.json`); walks with half as many columns would not, but they would read
everything twice as often. A kernel that has lost its registers keeps thousands."""
TIME_LIMIT = 120
"""Seconds of a processor for one kernel: on a busy machine compiling takes many times as long by the clock."""


@dataclass(kw_only=True)
class Compiled:
    """The result of compiling one kernel for one target."""

    case: str
    kernel: str
    target: str
    launch: str
    problem: str = ""
    seconds: float = 0.0
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether it compiled, fits and does not spill more than its target allows."""
        allowed = 0 if self.target in NEVER_SPILL else SPILL_LIMIT
        spills = self.spilled_bytes is None or self.spilled_bytes > allowed
        return not self.problem and not spills and self.shared_bytes <= ARCHITECTURES[self.target].shared_bytes


def _child(pipe: Any, call: TritonCall | CudaCall, target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 prints a notice
        try:
            pipe.send(call.compile(target))
        except Exception as caught:
            pipe.send({"problem": f"{type(caught).__name__}: {str(caught).strip()[-300:]}"})


def _compile_beside(call: TritonCall | CudaCall, target: str) -> dict[str, Any]:
    """`call.compile` in a process of its own."""
    context = multiprocessing.get_context("fork")  # keeps the modules that are imported here
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, call, target))
    process.start()
    sender.close()
    result = {"problem": "the compiler ended its process, or took too long"}
    with contextlib.suppress(EOFError):
        result = receiver.recv()
    process.join()
    return result


def shipped(
    operations: list[str], targets: list[str], *, quick: bool = False, case_part: str = ""
) -> Iterator[tuple[str, str, TritonCall | CudaCall]]:
    """Case, target and call of every kernel, each once, in cases whose names contain `case_part`."""
    for operation in operations:
        done: set[tuple[str, str]] = set()
        for case in CASES[operation]():
            if case_part not in case.name or (quick and not case.quick):
                continue
            for target in targets:
                for call in case.calls(target):
                    if (target, call.identity) not in done:
                        done.add((target, call.identity))
                        yield case.name, target, call


def rows_of(report: Path) -> list[dict[str, Any]]:
    """Rows of a report; none if there is no such file."""
    return json.loads(report.read_text(encoding="utf-8"))["rows"] if report.exists() else []


def key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """The fields of a row that name its kernel."""
    return row["case"], row["kernel"], row["target"], row["launch"]


def _record(report: Path, row: Compiled) -> None:
    """Add a row to a report, in place of an older one of the same kernel, with the versions that compiled it."""
    here = environment(torch.device("cpu"))
    new = asdict(row) | {
        "commit": here["git_commit"],
        "triton": here["versions"]["triton"],
        "ptxas": assembler(int(row.target.removeprefix("sm_"))) if row.target.startswith("sm_") else None,
    }
    rows = [each for each in rows_of(report) if key(each) != key(new)]
    write_results(report, {"environment": here, "rows": [*rows, new]})


def summary(rows: list[dict[str, Any]]) -> str:
    """A report as a table with a line for each target."""
    lines = ["| target | kernels | most registers | most shared memory (of) | that spill |", "|---|---|---|---|---|"]
    for target in sorted({row["target"] for row in rows}):
        here = [row for row in rows if row["target"] == target]
        spills = [row["spilled_bytes"] for row in here if row["spilled_bytes"]]
        most = max(row["shared_bytes"] for row in here) // KIB
        lines.append(
            f"| {target} | {len(here)} | {max(row['registers'] for row in here)} | {most} KiB "
            f"({ARCHITECTURES[target].shared_bytes // KIB}) | "
            + (f"{len(spills)}, by {max(spills)} bytes a thread at most |" if spills else "none |")
        )
    return "\n".join(lines)


def _drop_old_launches(report: Path) -> None:
    """Remove rows of a report whose kernels are no longer launched in this way."""
    rows = rows_of(report)
    targets = sorted({row["target"] for row in rows})
    launched = {(case, call.kernel, target, call.launch) for case, target, call in shipped(list(CASES), targets)}
    kept = [row for row in rows if key(row) in launched]
    if len(kept) < len(rows):
        write_results(report, {"environment": environment(torch.device("cpu")), "rows": kept})


@program("eval.compile_report")
def main(arguments: list[str] | None = None) -> int:
    """Print what every kernel compiles to; 1 if one does not, is too large or spills where it must not."""
    parser = argparse.ArgumentParser(prog="python -m eval.compile_report", description=main.__doc__)
    parser.add_argument("--operations", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(ARCHITECTURES))
    parser.add_argument("--quick", action="store_true", help="only what the quick tests compile")
    parser.add_argument("--case", default="", help="configurations whose name contains this")
    parser.add_argument("--kernel", default="", help="kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument(
        "--out",
        type=results_file,
        help="also add the rows to this JSON file, where parts of a report add up; "
        "rows of launches that no longer exist are removed",
    )
    parser.add_argument("--missing", action="store_true", help="only kernels that have no row in the file of --out")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="only print a report's totals, as a table")
    options = parser.parse_args(arguments)
    if options.summary:
        if not options.summary.is_file():
            parser.error(f"--summary {options.summary}: no such file; give one that --out wrote")
        print(summary(rows_of(options.summary)))
        return 0
    if options.missing and not options.out:
        parser.error("--missing compiles kernels that a report lacks: name the report with --out FILE")
    failed = 0
    heading = ("registers", "spilled", "shared", "seconds")
    if not options.json:
        print(f"{'configuration':34}{'kernel':24}{'target':8}" + "".join(f"{each:>10}" for each in heading) + "  ...")
    recorded = {key(row) for row in rows_of(options.out)} if options.missing else set()
    calls = shipped(options.operations, options.targets, quick=options.quick, case_part=options.case)
    for case, target, call in calls:
        if options.kernel not in call.kernel or (case, call.kernel, target, call.launch) in recorded:
            continue
        row = Compiled(
            case=case, kernel=call.kernel, target=target, launch=call.launch, **_compile_beside(call, target)
        )
        failed += not row.passed
        if options.out:
            _record(options.out, row)
        if options.json:
            print(json.dumps(asdict(row) | {"passed": row.passed}), flush=True)
            continue
        mark = "" if row.passed else "  <-- " + (row.problem or "too much")
        print(
            f"{row.case:34}{row.kernel:24}{row.target:8}{row.registers!s:>10}{row.spilled_bytes!s:>10}"
            f"{row.shared_bytes:>10}{row.seconds:>10.1f}  {row.instructions} {row.launch}{mark}",
            flush=True,
        )
    if options.out and options.out.exists():
        _drop_old_launches(options.out)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
