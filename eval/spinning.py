"""Measure the cost of OpenMP's ways of waiting on an idle and on a busy machine: `python -m eval.spinning`.

A process for each way trains xlstm-cpu-0.7m on two threads. They take turns, alone, beside busy loops and beside
other OpenMP processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from eval.command import positive
from xlstm_lm.base.program import program
from xlstm_lm.base.threads import BOUNDED_SPIN, USERS_CHOICES

WAYS = {
    # A variable without effect on libgomp keeps xlstm_lm from setting its own; it says libomp's default.
    "the library's own": {"KMP_LIBRARY": "throughput"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "bounded spin": BOUNDED_SPIN,
}
NEIGHBORS = {
    "alone": "",
    "busy loops": "while True: pass",
    "OpenMP processes": "import torch\na = torch.randn(700, 700)\nwhile True: a @ a",
}
ROWS, LENGTH = 4, 256


def train_on_request() -> None:
    """A contender: for each number of seconds on standard input, train so long and print tokens/s."""
    import torch

    from eval.bench.speed_models import parse_model

    model = parse_model("xlstm-cpu-0.7m").build("cpu", torch.float32)
    tokens_BT = torch.randint(0, 256, (ROWS, LENGTH))

    def step() -> None:
        model.loss(model.hidden(tokens_BT), tokens_BT).backward()

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        begin, steps = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begin) < float(line) or not steps:
            step()
            steps += 1
        print(steps * ROWS * LENGTH / seconds, flush=True)


@contextlib.contextmanager
def neighbors(code: str, count: int) -> Iterator[None]:
    """Keep the machine busy with `count` processes."""
    environment = _environment(WAYS["the library's own"])
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment) for _ in range(count)] if code else []
    try:
        time.sleep(10 if "torch" in code else 0.5 if code else 0)  # until they have been imported
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(seconds: float, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Median tokens/s by neighbors and way of waiting."""
    command = [sys.executable, "-m", "eval.spinning", "--contender"]
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name, variables in WAYS.items():
            process = subprocess.Popen(
                command, env=_environment(variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            contenders[name] = process
        for process in contenders.values():
            process.stdout.readline()
        found = {}
        for beside, code in NEIGHBORS.items():
            rates: dict[str, list[float]] = {name: [] for name in contenders}
            with neighbors(code, count):
                for _ in range(rounds):
                    for name, process in contenders.items():
                        process.stdin.write(f"{seconds}\n")
                        process.stdin.flush()
                        rates[name].append(float(process.stdout.readline()))
            found[beside] = {name: statistics.median(each) for name, each in rates.items()}
    return found


def _environment(variables: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*USERS_CHOICES, "OMP_NUM_THREADS")}
    return kept | variables | {"OMP_NUM_THREADS": "2"}


@program("eval.spinning")
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.spinning", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="of each turn (default 4)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="turns of each (default 3)")
    parser.add_argument("--neighbors", type=positive, default=4, metavar="N", help="processes beside (default 4)")
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        train_on_request()
        return
    load = os.getloadavg()[0]
    found = measure(options.seconds, options.rounds, options.neighbors)
    print(f"tokens/s on two threads, as a share of the library's own way alone; load average before: {load:.1f}\n")
    print("\n".join(["| beside | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]))
    whole = found["alone"]["the library's own"]
    for beside, rates in found.items():
        print(f"| {beside} | " + " | ".join(f"{rate / whole:.3f}" for rate in rates.values()) + " |")
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
