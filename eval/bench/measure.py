"""How the studies of speed measure: contenders that take turns, medians with their spread, and the machine's ceilings.

On a GPU a step is timed by events on the device. Before each step the caches are filled with something else, and the
device waits while the host launches the step, so the launches do not count as long as they take less than the wait. The
host's own time is reported beside. On a CPU a step on one thread is timed by the processor time of this process, which
leaves out other processes.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.study.journal import Journal
from xlstm_lm.base import machine
from xlstm_lm.base.durations import utc_now

Step = Callable[[], object]
FLUSHED_BYTES = 2**29
"""Written between two steps on a GPU: twice the largest cache, the 256 MiB of an MI300X."""
HEAD_START = 5e-3
"""Seconds that a GPU waits before a step: several times what the host needs for the 50 or so launches of a kernel."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Timing:
    """Median and median absolute deviation, in milliseconds."""

    milliseconds: float
    spread_milliseconds: float
    host_milliseconds: float | None = None
    """Median of the host's own time to launch a step on a GPU; None on a CPU. Above `HEAD_START` it is part of the
    measured time."""


def summarize(seconds: list[float], host_seconds: list[float] | None = None) -> Timing:
    """Median and spread of measured seconds, and the median of the host's."""
    median = statistics.median(seconds)
    spread = statistics.median(abs(second - median) for second in seconds)
    return Timing(median * 1e3, spread * 1e3, statistics.median(host_seconds) * 1e3 if host_seconds else None)


def measure(
    steps: dict[str, Step],
    rounds: int,
    device: str,
    warm_up: int = 1,
    host_seconds: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round, the steps taking turns; `warm_up` more rounds before are not counted.

    On a GPU, the host's seconds for the same steps are added to `host_seconds`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(warm_up + rounds):
        for name, step in steps.items():
            elapsed, by_host = _by_events(step) if device == "cuda" else (_by_a_clock(clock(device), step), None)
            if round_index < warm_up:
                continue
            seconds[name].append(elapsed)
            if by_host is not None and host_seconds is not None:
                host_seconds.setdefault(name, []).append(by_host)
    return seconds


TOGETHER = "all in turns"
LOST = 70
"""Exit code of a process whose GPU has become useless to it; another process continues."""


def take_turns(
    title: str, makers: dict[str, Callable[[], Step]], *, journal: Journal, device: str, rounds: int, seconds: float
) -> dict[str, Timing | str]:
    """Make every contender and run it once by itself, then time those that could run, in turns.

    Returns a timing or an error message for each name. Rounds are reduced, to three at least, where they would exceed
    `seconds`. A contender that killed an earlier process of this journal is not tried again.

    Raises:
        SystemExit: a contender has left the GPU useless for this process; the journal says which.
    """
    outcomes: dict[str, Timing | str] = {}
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        what = f"{title} | {name}"
        outcomes[name] = journal.failed.get(what, "")
        if outcomes[name]:
            continue
        journal.trying(what)
        try:
            step = make()
            step()
            synchronize(device)
        except Exception as caught:
            outcomes[name] = one_line(caught)
            try:
                synchronize(device)
            except RuntimeError:
                journal.died(outcomes[name])
                raise SystemExit(LOST) from None
        else:
            steps[name] = step
    together = f"{title} | {TOGETHER}"
    if together in journal.failed:
        return outcomes | dict.fromkeys(steps, f"while contenders took turns, {journal.failed[together]}")
    journal.trying(together)
    try:
        first_round = measure(steps, 1, device, warm_up=0)
        total = sum(each[0] for each in first_round.values())
        rounds = max(3, min(rounds, int(seconds / total))) if steps else 0
        host: dict[str, list[float]] = {}
        measured = measure(steps, rounds, device, warm_up=0, host_seconds=host)
        outcomes |= {name: summarize(each, host.get(name)) for name, each in measured.items()}
    except Exception as caught:
        journal.died(one_line(caught))
        if device == "cuda":
            raise SystemExit(LOST) from caught
        raise
    journal.trying(None)
    return outcomes


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def one_line(error: BaseException) -> str:
    """An error's message for a table's cell."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def clock(device: str) -> Callable[[], float]:
    """The clock for a device: on a CPU with one thread the time of this process, otherwise wall time."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _by_a_clock(now: Callable[[], float], step: Step) -> float:
    start = now()
    step()
    return now() - start


def _by_events(step: Step) -> tuple[float, float]:
    """Seconds of a step on the GPU, and of the host to launch it."""
    size = min(FLUSHED_BYTES, torch.cuda.get_device_properties(0).total_memory // 16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.empty(size, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(_cycles(HEAD_START))
    start.record()
    before = time.perf_counter()
    step()
    by_host = time.perf_counter() - before
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, by_host


@functools.cache
def _cycles(seconds: float) -> int:
    """The cycles of the GPU's clock in so many seconds, measured once."""
    trial = 10**7
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(trial)  # the first launch takes longer
    start.record()
    torch.cuda._sleep(trial)
    end.record()
    end.synchronize()
    return int(trial * seconds / (start.elapsed_time(end) / 1e3))


@dataclass(frozen=True)
class Ceilings:
    """The best rates of this machine: bytes read and written by a large copy, operations of a large product."""

    bytes_per_second: float
    operations_per_second: float

    def share(self, operations: float, moved_bytes: float, seconds: float) -> float:
        """The least time that so much work could take here, over the time that it took."""
        return max(operations / self.operations_per_second, moved_bytes / self.bytes_per_second) / seconds


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """The roofline of `device`: a copy far larger than the caches, and a product of two square random matrices."""
    size, width = (2**31, 8192) if device == "cuda" else (2**27, 1024)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = measure({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 8, device)
    copied, multiplied = min(seconds["copy"]), min(seconds["product"])
    return Ceilings(2 * size / copied, 2 * width**3 / multiplied)


def environment(device: str) -> dict[str, Any]:
    """Machine, source and command that a figure was measured with."""
    here = machine.environment(torch.device(device))
    processor = f"{here['device']}, {here['cpu_count']} processors, {here['cpu_capability']}"
    return {
        "date": utc_now(),
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "git_commit": here["git_commit"],
        "python": here["python"],
        "torch": here["versions"]["torch"],
        "triton": here["versions"]["triton"],
        "cuda": here["cuda"],
        "assembler": here["assembler"],
        "device": device,
        "device_name": here["device"] if device == "cuda" else processor,
        "threads": here["torch_threads"],
    }


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
