"""What a run reports: metrics.jsonl and one line of progress. Numbers stay on the device until a step is logged."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xlstm_lm.base import console
from xlstm_lm.base.durable_files import disk_errors_explained, replace_durably
from xlstm_lm.ops.gpu import gpu_of
from xlstm_lm.runs.folder import RunFolder


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the device can do at most in bf16; None where it is not known."""
    gpu = gpu_of(device)
    return gpu.bf16_flops if gpu else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with split and step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.superseded = path.with_name("superseded.jsonl")
        self._file: Any = None

    def cut_behind(self, step: int) -> int:
        """Move what was written after the checkpoint of `step`, and damaged lines, to the end of superseded.jsonl.

        A run that was killed trains those steps again; one that goes on from an older checkpoint may take another way.

        Returns:
            how many lines were moved.
        """
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        kept = [line.encode() for line in RunFolder(self.path.parent).metric_lines(step)]
        stays = set(kept)
        cut = [line for line in lines if line.strip() and line not in stays]
        with disk_errors_explained(self.path):
            if cut:
                before = self.superseded.read_bytes() if self.superseded.is_file() else b""
                replace_durably(self.superseded, before + b"".join(line + b"\n" for line in cut))
            replace_durably(self.path, b"".join(line + b"\n" for line in kept))
            self.open()
        return len(cut)

    def open(self) -> None:
        """Get ready to append. Unbuffered, so that no half of a line is left over to fail at the end."""
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line. A number that is not finite becomes null, which JSON has no other word for."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with disk_errors_explained(self.path):
            self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Write all lines through to the disk, so that no checkpoint is newer than they are."""
        with disk_errors_explained(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


class Clock:
    """Seconds of the whole run over all its sessions, and tokens a second since the last look, pauses left out."""

    def __init__(self, elapsed_before: float) -> None:
        self._start = time.perf_counter() - elapsed_before
        self._window_start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def restart_window(self) -> float:
        """Seconds since the last call, without pauses."""
        now = time.perf_counter()
        seconds, self._window_start = now - self._window_start, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: validation, saving."""
        before = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - before


class Progress:
    """One line of progress: a bar on a terminal, a line each logged step elsewhere."""

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        self._steps, self._first, self._step = steps, done, done
        self._start = time.perf_counter()
        self._enabled = enabled
        self._bar = None
        console.end_stage()
        if enabled and console.console().isatty():
            self._bar = tqdm(
                total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.05, file=console.console()
            )

    def advance(self) -> None:
        """One step is done; nothing is read from the device."""
        self._step += 1
        if self._bar:
            self._bar.update()

    def show(self, loss: float, bits_per_byte: float | None, tokens_per_second: float) -> None:
        """The numbers of a logged step."""
        if not self._enabled:
            return
        bits = "" if bits_per_byte is None else f"  bits/byte {bits_per_byte:.4f}"
        numbers = f"loss {loss:.4f}{bits}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.set_postfix_str(numbers, refresh=False)
            return
        seconds_a_step = (time.perf_counter() - self._start) / max(self._step - self._first, 1)
        left = round(seconds_a_step * (self._steps - self._step))
        self.say(f"step {self._step}/{self._steps}  {numbers}  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._enabled:
            console.write(text)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
