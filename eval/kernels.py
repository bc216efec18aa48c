"""How fast the mLSTM and the sLSTM are, beside attention and torch's LSTM: `python -m eval.kernels --device cpu`.

All contenders of a table run on the same sizes in one process, taking turns, so that the ratio holds on a noisy
machine. Before it is timed, each of ours is compared with its definition in float64, values and gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import compile_report
from xlstm_lm.ops.mlstm import mlstm
from xlstm_lm.ops.selfcheck import compare
from xlstm_lm.ops.slstm import slstm

Step = Callable[[], None]


@dataclass
class Row:
    """One line of a table."""

    name: str
    sizes: str
    milliseconds: float
    spread_milliseconds: float
    ratio: float
    error: float | None


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step in each round, the steps taking turns; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(rounds + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(steps: dict[str, Step], sizes: str, rounds: int, device: str, errors: dict[str, float]) -> list[Row]:
    """Medians with their spread (median absolute deviation), and the ratio to the first step."""
    rows: list[Row] = []
    for name, seconds in measure(steps, rounds, device).items():
        median = statistics.median(seconds)
        spread = statistics.median(abs(second - median) for second in seconds)
        ratio = median * 1e3 / rows[0].milliseconds if rows else 1.0
        rows.append(Row(name, sizes, median * 1e3, spread * 1e3, ratio, errors.get(name)))
    return rows


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """A forward and a backward pass with the gradients of all inputs."""
    upstream = torch.randn_like(function(*inputs))

    def step() -> None:
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return step


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """A forward pass that keeps nothing for a backward pass."""

    def step() -> None:
        with torch.no_grad():
            function(*inputs)

    return step


def leaf(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=device)).requires_grad_()


def mlstm_table(lengths: list[int], rounds: int, device: str) -> list[Row]:
    """mLSTM at B 2, H 4, K 64, V 128 beside causal attention of head dimension 64 at the same B, H, T."""
    rows: list[Row] = []
    batch, heads, k, v = 2, 4, 64, 128
    for length in lengths:
        query, key, value = (leaf(batch, heads, length, 64, device=device) for _ in range(3))
        ours = [leaf(batch, length, heads, size, device=device) for size in (k, k, v)]
        ours += [leaf(batch, length, heads, device=device) for _ in range(2)]
        errors = {}
        if length == lengths[0]:
            definition = functools.partial(mlstm, backend="recurrence")
            errors["mlstm"] = compare(mlstm, definition, [each[:, :257] for each in ours])
        attention = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        steps = {
            "causal attention (SDPA)": forward_backward(attention, query, key, value),
            "mlstm": forward_backward(mlstm, *ours),
        }
        sizes = f"B {batch} H {heads} T {length} K {k} V {v}"
        rows += table(steps, sizes, rounds if length <= 4096 else 3, device, errors)
    return rows


def slstm_table(rounds: int, device: str) -> list[Row]:
    """sLSTM with 4 heads of 64 beside torch.nn.LSTM(256), without the input projection and with it."""
    heads, dim = 4, 64
    width = heads * dim
    rows: list[Row] = []

    def with_projection(x: Tensor, weight: Tensor, r: Tensor, bias: Tensor) -> Tensor:
        return slstm(F.linear(x, weight).unflatten(-1, (4, heads, dim)), r, bias)

    lstm = torch.nn.LSTM(width, width, batch_first=True).to(device)
    lstm_weights = list(lstm.parameters())
    r, bias = leaf(4, heads, dim, dim, device=device, scale=dim**-0.5), leaf(4, heads, dim, device=device)
    weight = leaf(4 * width, width, device=device, scale=width**-0.5)
    for batch, length, training in ((8, 512, True), (1, 512, False)):
        x, wx = leaf(batch, length, width, device=device), leaf(batch, length, 4, heads, dim, device=device)
        contenders: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
            "torch.nn.LSTM(256)": (lambda x, *_: lstm(x)[0], [x, *lstm_weights]),
            "slstm": (slstm, [wx, r, bias]),
            "slstm and its input projection": (with_projection, [x, weight, r, bias]),
        }
        errors = {"slstm": compare(slstm, functools.partial(slstm, backend="recurrence"), [wx[:, :100], r, bias])}
        run = forward_backward if training else forward
        steps = {name: run(function, *inputs) for name, (function, inputs) in contenders.items()}
        sizes = f"B {batch} T {length} 4 heads of 64, {'forward + backward' if training else 'forward'}"
        rows += table(steps, sizes, rounds, device, errors)
    return rows


def as_markdown(rows: list[Row]) -> str:
    """The rows as a table for people."""
    lines = [
        "| operation | sizes | ms (median ± MAD) | to the first | error against float64 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        timing = f"{row.milliseconds:.2f} ± {row.spread_milliseconds:.2f}"
        lines.append(f"| {row.name} | {row.sizes} | {timing} | {row.ratio:.2f} | {error} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables and, with --out, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--compile-report", action="store_true", help="what the Triton kernels compile to; no GPU needed"
    )
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    options = parser.parse_args()
    if options.compile_report:
        sys.exit(compile_report.main([]))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), forward + backward, float32\n")
    rows = mlstm_table(options.lengths, options.rounds, options.device)
    rows += slstm_table(options.rounds, options.device)
    print(as_markdown(rows))
    if options.out:
        environment = {
            "torch": torch.__version__,
            "device": options.device,
            "threads": options.threads,
            "machine": platform.processor(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"environment": environment, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
