"""Times of each rank that show which one the others wait for.

The time of a whole step is equal on all ranks, because each collective makes the fast ranks wait for the slow one. What
differs is the time that a rank works before the first reduction of gradients, without the time that it waits in
collectives before that one (the gathering of weights under ZeRO 3).
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.comm.comm
import torch

from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.telemetry import peak_memory_bytes

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "all_to_all")
GATHERINGS = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "broadcast")
"""Functions of DeepSpeed's backend, through which it starts every collective of a step."""


class StepTimes:
    """Times of this rank's steps since the last logged one. Reads clocks and events; never waits for the device."""

    def __init__(self, world: World) -> None:
        """Observe the collectives that DeepSpeed starts, until `close`. DeepSpeed must be initialized."""
        self._world = world
        self._host = socket.gethostname()
        self._depth = 0
        self._in_step = False
        self._first: float | torch.cuda.Event | None = None
        self._blocked = self._blocked_before_first = 0.0
        self._device_times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._restart()
        self._backend = deepspeed.comm.comm.cdb
        self._originals = {name: getattr(self._backend, name) for name in (*REDUCTIONS, *GATHERINGS)}
        for name, function in self._originals.items():
            setattr(self._backend, name, self._observed(function, reduces=name in REDUCTIONS))

    def _restart(self) -> None:
        self._steps, self._waited = 0, 0.0
        self._before_first, self._in_collectives, self._stepping = 0.0, 0.0, 0.0
        self._reduced = False
        self._device_times.clear()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the block's time as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time a step of the engine, whose collectives end with those of the optimizer."""
        self._first, self._blocked, self._blocked_before_first = None, 0.0, 0.0
        began, start = time.perf_counter(), self._now()
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        ended = time.perf_counter()
        self._steps += 1
        self._stepping += ended - began
        self._in_collectives += self._blocked
        if isinstance(self._first, float):
            self._reduced = True
            self._before_first += self._first - began - self._blocked_before_first
        elif self._first is not None:
            self._reduced = True
            assert isinstance(start, torch.cuda.Event)
            self._device_times.append((start, self._first))

    def gather(self) -> dict[str, Any]:
        """Metrics of the ranks over the steps since the last call, on rank 0; empty on the others. Collective.

        Their device work must have ended, as it has once the loss of the last step has been read.
        """
        steps = max(self._steps, 1)
        before = self._before_first + sum(start.elapsed_time(end) / 1000 for start, end in self._device_times)
        # On a GPU the host does not wait in a collective, and the kernels of collectives overlap with others.
        on_host = self._world.device.type == "cpu" and self._world.size > 1 and self._stepping > 0
        own = {
            "rank": self._world.rank,
            "host": self._host,
            "seconds_to_first_collective": before / steps if self._reduced else None,
            "data_wait_seconds": self._waited / steps,
            "communication_share": self._in_collectives / self._stepping if on_host else None,
            "memory_bytes": peak_memory_bytes(self._world.device),
        }
        self._restart()
        return summary(self._world.gather(own))

    def close(self) -> None:
        """Stop observing collectives."""
        for name in self._originals:
            delattr(self._backend, name)

    def _now(self) -> float | torch.cuda.Event:
        if self._world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def _blocking(self) -> Iterator[None]:
        began = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._in_step and not self._depth:
                self._blocked += time.perf_counter() - began

    def _observed(self, function: Callable[..., Any], reduces: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if reduces and self._in_step and self._first is None:
                self._first, self._blocked_before_first = self._now(), self._blocked
            with self._blocking():
                handle = function(*arguments, **named)
            return _ObservedWork(handle, self._blocking) if hasattr(handle, "wait") else handle

        return call


class _ObservedWork:
    """The handle of a collective, with its `wait` timed."""

    def __init__(self, work: Any, blocking: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._work, self._blocking = work, blocking

    def wait(self, *arguments: Any) -> Any:
        with self._blocking():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of all ranks: minimum, median and maximum of times, the slowest rank, the largest memory.

    Args:
        ranks: For each rank: rank, host, seconds_to_first_collective, data_wait_seconds, communication_share and
            memory_bytes; None for a number that is not known. Empty on ranks other than 0.
    """
    if not ranks:
        return {}
    found: dict[str, Any] = {"memory_bytes": max(each["memory_bytes"] for each in ranks)}
    for name in ("data_wait_seconds", "seconds_to_first_collective"):
        values = [each[name] for each in ranks if each[name] is not None]
        if values:
            for part, of in (("min", min), ("median", statistics.median), ("max", max)):
                found[f"ranks/{name}_{part}"] = of(values)
    shares = [each["communication_share"] for each in ranks if each["communication_share"] is not None]
    if shares:
        found["ranks/communication_share"] = statistics.fmean(shares)
    timed = [each for each in ranks if each["seconds_to_first_collective"] is not None]
    if len(timed) > 1:
        slowest = max(timed, key=lambda each: each["seconds_to_first_collective"] + each["data_wait_seconds"])
        found |= {"slowest_rank": slowest["rank"], "slowest_host": slowest["host"]}
    return found
