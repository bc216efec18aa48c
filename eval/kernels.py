"""How fast our kernels are, beside attention, torch's LSTM and every peer installed: `python -m eval.kernels`.

All contenders of a table run on the same sizes in one process, taking turns, which makes the ratio robust on a noisy
machine. Before it is timed, each is compared with its definition in float64, values and gradients; one that is wrong or
crashes keeps its row, with what went wrong. `eval.bench.kernel_cases` says how operations and bytes are counted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eval import compile_report
from eval.bench.kernel_cases import MLSTM, Case, Contender, Function, cpu_cases, gpu_cases
from eval.bench.measure import DTYPES, Ceilings, Step, Timing, dtype_name, take_turns
from eval.bench.peers import PEERS
from eval.bench.tables import ceilings_of_study, go_through
from eval.study.journal import Journal, run_in_children
from eval.study.picture import OWN, draw_over_length
from eval.study.results_file import results_file
from xlstm_lm.base.fields import Count, NonNegative, Positive, Size, argument
from xlstm_lm.base.program import program
from xlstm_lm.ops.selfcheck import TOLERANCE, errors

SECONDS_A_CASE = {"cpu": 120.0, "cuda": 5.0}
"""Time that the timed rounds of a table may use before their number is reduced, by device."""


@dataclass(kw_only=True)
class Row:
    """One line of a table."""

    operation: str
    name: str
    sizes: str
    dtype: str
    direction: str
    milliseconds: float | None = None
    spread_milliseconds: float | None = None
    host_milliseconds: float | None = None
    """The host's own time to launch it on a GPU."""
    ratio: float | None = None
    """To the first contender of the table that was timed."""
    teraflops: float | None = None
    """Per second."""
    gigabytes: float | None = None
    """Per second, of the bytes that have to move."""
    roofline_share: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    problem: str = ""


def contenders_of(case: Case) -> dict[str, Callable[[], Contender]]:
    """Makers of a case's contenders: installed peers first, then our kernels."""
    inputs = case.inputs()
    found: dict[str, Callable[[], Contender]] = {}
    for name, (package, builder) in PEERS[case.operation, case.device].items():
        if importlib.util.find_spec(package) is not None:
            found[name] = functools.partial(builder, case, inputs)
    for name, contender in case.own(inputs):
        found[name] = lambda contender=contender: contender
    return found


def step_of(case: Case, contender: Contender) -> Step:
    """A forward pass that keeps nothing, or a forward and a backward pass with the gradients of all inputs."""
    if not case.backward:

        def forward() -> None:
            with torch.no_grad():
                contender.function(*contender.inputs)

        return forward
    leaves = [each.detach().requires_grad_() for each in contender.inputs]
    upstream = torch.randn_like(contender.function(*leaves))

    def forward_backward() -> None:
        torch.autograd.grad(contender.function(*leaves), leaves, upstream)

    return forward_backward


def run_case(case: Case, journal: Journal, rounds: int, ceilings: Ceilings) -> list[Row]:
    """Check every contender, then time all that run."""
    direction = "forward + backward" if case.backward else "forward"
    common = {"operation": case.operation, "sizes": case.sizes, "dtype": dtype_name(case.dtype), "direction": direction}
    rows: dict[str, Row] = {}
    contenders: dict[str, Contender] = {}

    def prepare(name: str, make: Callable[[], Contender]) -> Step:
        contenders[name] = contender = make()
        rows[name].error, rows[name].gradient_error = _check(contender, case.backward)
        rows[name].problem = _verdict(rows[name], contender, TOLERANCE[case.dtype])
        return step_of(case, contender)

    makers = {}
    for name, make in contenders_of(case).items():
        rows[name] = Row(name=name, **common)
        makers[name] = functools.partial(prepare, name, make)
    seconds = SECONDS_A_CASE[case.device]
    outcomes = take_turns(case.title, makers, journal=journal, device=case.device, rounds=rounds, seconds=seconds)
    first = next((each for each in outcomes.values() if isinstance(each, Timing)), None)
    for name, outcome in outcomes.items():
        if isinstance(outcome, Timing):
            _fill(rows[name], case, contenders[name], outcome, first, ceilings)
        else:
            rows[name].problem = f"fails: {outcome}"
    return list(rows.values())


def _check(contender: Contender, gradients: bool) -> tuple[float, float | None]:
    """The largest errors, of the value and of the gradients, over the contender's checks."""
    found = [
        errors(contender.function, check.definition, check.inputs, gradients=gradients) for check in contender.checks
    ]
    values, of_gradients = zip(*found)
    return max(values), max(of_gradients) if gradients else None


def _verdict(row: Row, contender: Contender, tolerance: float) -> str:
    """The problem, or "". Gradients without the normalizer's part are right where a norm of each head follows."""
    if not row.error <= tolerance:
        return f"wrong values (allowed {tolerance:.0e})"
    if row.gradient_error is None or row.gradient_error <= tolerance:
        return ""
    check = contender.checks[0]
    normed, exact = (functools.partial(_behind_a_norm, each) for each in (contender.function, check.definition))
    behind = max(errors(normed, exact, check.inputs))
    also = f"; behind a norm of each head {behind:.0e}" if row.operation == "mlstm" and behind <= tolerance else ""
    return f"wrong gradients (allowed {tolerance:.0e}{also})"


def _behind_a_norm(function: Function, *inputs: torch.Tensor) -> torch.Tensor:
    out = function(*inputs)
    return torch.nn.functional.layer_norm(out, out.shape[-1:])


def _fill(row: Row, case: Case, contender: Contender, timing: Timing, first: Timing, ceilings: Ceilings) -> None:
    seconds = timing.milliseconds / 1e3
    operations = contender.operations if contender.operations is not None else case.operations()
    operations *= 3 if case.backward else 1
    moved = contender.moved_bytes if contender.moved_bytes is not None else case.moved_bytes()
    row.milliseconds, row.spread_milliseconds = timing.milliseconds, timing.spread_milliseconds
    row.host_milliseconds = timing.host_milliseconds
    row.ratio = timing.milliseconds / first.milliseconds
    row.teraflops, row.gigabytes = operations / seconds / 1e12, moved / seconds / 1e9
    row.roofline_share = ceilings.share(operations, moved, seconds)


def as_markdown(rows: list[Row]) -> str:
    """The rows of one case as a table for people."""
    columns = [
        f"| {rows[0].operation} | ms (median ± MAD) | to the first | TFLOP/s | GB/s | of the roofline "
        "| error of values | of gradients | |",
        "|---" * 9 + "|",
    ]
    steps = rows[0].sizes.split(" T ")[-1].split()[0] if rows[0].operation == "slstm" else None

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        timing = "" if row.milliseconds is None else f"{row.milliseconds:.3f} ± {row.spread_milliseconds:.3f}"
        if row.host_milliseconds is not None:
            timing += f", host {row.host_milliseconds:.3f}"
        if steps and row.milliseconds is not None:
            timing += f" ({row.milliseconds * 1e3 / int(steps):.2f} µs a step)"
        cells = (
            row.name,
            timing,
            number(row.ratio, ".2f"),
            number(row.teraflops, ".3g"),
            number(row.gigabytes, ".3g"),
            number(row.roofline_share, ".0%"),
            number(row.error, ".1e"),
            number(row.gradient_error, ".1e"),
            row.problem.replace("|", "/"),
        )
        columns.append(f"| {' | '.join(cells)} |")
    return "\n".join(columns)


def draw(rows: list[Row], cases: list[Case], path: Path) -> bool:
    """The mLSTM's times, forward and backward, over the length, for each head size."""
    by_sizes = {case.sizes: case for case in cases if isinstance(case, MLSTM) and case.backward}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        case = by_sizes.get(row.sizes)
        if case is None or row.milliseconds is None or row.direction == "forward":
            continue
        name = row.name + (f" ({row.problem.partition(' (')[0]})" if row.problem else "")
        panel = panels.setdefault(f"{case.H} heads, K {case.K}, V {case.V}", {})
        panel.setdefault(name, []).append((case.T, row.milliseconds * 1e6 / (case.B * case.T)))
    if not panels:
        return False
    return draw_over_length(panels, path, x_label="sequence length", y_label="ns a token, forward + backward")


@program("eval.kernels")
def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and, with --out, write them as JSON and the mLSTM's times over length as a picture."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.compile_report:
        sys.exit(compile_report.main([]))
    if options.device == "cuda" and not options.journal:
        sys.exit(run_in_children("eval.kernels", arguments, options.silence))
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    cases = list(
        gpu_cases(options.lengths, dtype, options.tokens)
        if options.device == "cuda"
        else cpu_cases(options.lengths, dtype)
    )
    cases = [case for case in cases if options.only in (None, case.operation)]
    journal = Journal(options.journal)
    ceilings = ceilings_of_study(options, journal)
    tables = {case.title: functools.partial(run_case, case, journal, options.rounds, ceilings) for case in cases}
    rows = go_through(tables, options, journal, Row, as_markdown)
    picture = options.picture or (options.out and options.out.with_suffix(".png"))
    if picture and draw(rows, cases, picture):
        print(f"\nWrote {picture}")
    wrong = [f"{row.name}, {row.sizes}, {row.direction}: {row.problem}" for row in rows if is_ours_and_bad(row)]
    if wrong:
        sys.exit("\nOur own kernels fail here:\n" + "\n".join(wrong))


def is_ours_and_bad(row: Row) -> bool:
    """Whether one of our kernels is wrong or crashed. One that refuses a size or a type is neither."""
    return row.name.startswith(OWN) and bool(row.problem) and not row.problem.startswith("fails: ValueError")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--threads", type=argument(Size), default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=argument(Count), default=15, help="timed rounds at most (default 15)")
    parser.add_argument(
        "--lengths", type=argument(Count), nargs="+", help="of the mLSTM; default 1024 .. 16384, GPU 2048 .. 65536"
    )
    parser.add_argument(
        "--tokens", type=argument(Count), default=65536, help="in a batch of the mLSTM on a GPU (default 65536)"
    )
    parser.add_argument("--only", choices=["mlstm", "slstm", "gated delta", "mlstm step"], help="one operation")
    parser.add_argument(
        "--budget", type=argument(NonNegative), default=0, help="seconds after which no table is begun; 0: no limit"
    )
    parser.add_argument(
        "--silence",
        type=argument(Positive),
        default=75.0,
        help="seconds after which a kernel on a GPU counts as hanging (default 75; what nvcc compiles needs more)",
    )
    parser.add_argument("--out", type=results_file, help="also write the rows to this JSON file")
    parser.add_argument("--picture", type=Path, help="draw here instead of beside --out")
    parser.add_argument("--compile-report", action="store_true", help="what the GPU kernels compile to; no GPU needed")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)  # the process that a supervisor starts has one
    parser.add_argument("--begin", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.lengths = options.lengths or [2**n for n in (range(11, 17) if on_gpu else range(10, 15))]
    return options


if __name__ == "__main__":
    main()
