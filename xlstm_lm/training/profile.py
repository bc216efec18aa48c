"""Traces of some steps by torch's profiler, and snapshots of a GPU's memory."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xlstm_lm.base.durable_files import disk_errors_explained
from xlstm_lm.base.fields import check_fields
from xlstm_lm.parallel.process_group import World

LONGEST = 100
"""Steps of a trace at most: each takes megabytes."""
ROWS = 15
"""Operations of the table."""
MEMORY_EVENTS = 100_000
"""Allocations that a snapshot of memory remembers, the newest."""


@dataclass(kw_only=True)
class ProfileConfig:
    """Profiles of a run."""

    steps: str | None = None
    """FIRST:LAST, both included: steps that each rank traces into profile/ of the run's folder; null for none."""
    memory: bool = False
    """Whether a GPU's allocations are recorded, and written to profile/ when memory runs out."""

    def __post_init__(self) -> None:
        check_fields(self, "profile.")
        _ = self.range

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last step of the trace; None for no trace.

        Raises:
            ValueError: `steps` is no such range.
        """
        if self.steps is None:
            return None
        match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.steps)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last < first + LONGEST:
            raise ValueError(
                f"profile.steps is {self.steps!r}; it must be 'FIRST:LAST', such as '20:24', with steps from 1 on and "
                f"at most {LONGEST} of them. In a recipe it needs the quotes."
            )
        return first, last

    def check_steps(self, steps: int) -> None:
        """Refuse a trace beyond the last step of a run.

        Raises:
            ValueError: the run ends before the trace.
        """
        if self.range is not None and self.range[1] > steps:
            raise ValueError(
                f"profile.steps is {self.steps}, but the run has {steps} steps: choose a range that ends by then, or "
                "raise training.steps."
            )


class StepProfiler:
    """Profiler of a range of steps on this rank."""

    def __init__(self, config: ProfileConfig, folder: Path, world: World, say: Callable[[str], None]) -> None:
        """Prepare a profile; without a range nothing is done.

        Args:
            config: Section profile of the recipe.
            folder: Folder for the files, which is made when there is one.
            world: All processes.
            say: Prints a line, on rank 0.
        """
        self._config, self._folder, self._world, self._say = config, folder, world, say
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Start tracing if `step`, which is about to begin, is the first of the range."""
        is_first = self._config.range is not None and step == self._config.range[0]
        if is_first and self._profiler is None:  # a run that goes back within the range is being traced
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Write trace and table if `step`, which has ended, is the last of the range."""
        if self._profiler is not None and self._config.range is not None and step == self._config.range[1]:
            self._write(step)

    def close(self, last_step: int) -> None:
        """Write the trace of a run that ends within the range, up to `last_step`."""
        if self._profiler is not None:
            self._write(last_step)

    def _write(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert self._config.range is not None
        profiler.stop()
        name = f"steps_{self._config.range[0]}-{last}_rank{self._world.rank:04}"
        by = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        trace = new_file(self._folder, f"trace_{name}", ".json")
        with disk_errors_explained(trace):
            profiler.export_chrome_trace(str(trace))
            table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=40)
            trace.with_name(f"{trace.stem.replace('trace', 'operations', 1)}.txt").write_text(table, encoding="utf-8")
        self._say(f"{table}\nTraces of steps {self._config.range[0]} to {last}, for chrome://tracing: {self._folder}")


def new_file(folder: Path, stem: str, suffix: str) -> Path:
    """A path in `folder`, which is made, that no file has yet: a number follows the stem if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([f"{stem}{suffix}"], (f"{stem}_{number}{suffix}" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def record_memory(config: ProfileConfig, device: torch.device) -> None:
    """Record the allocations of a GPU from now on, if the recipe says so."""
    if config.memory and device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)


def write_memory_snapshot(config: ProfileConfig, folder: Path, world: World) -> Path | None:
    """Write the recorded allocations for pytorch.org/memory_viz; None if there are none or the disk is full."""
    if not config.memory or world.device.type != "cuda":
        return None
    with contextlib.suppress(OSError):  # the lack of memory is what the user must see
        path = new_file(folder, f"memory_rank{world.rank:04}", ".pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        return path
    return None
