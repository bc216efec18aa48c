"""Speed, memory, and the line of progress of a run."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from xlstm_lm.base import console
from xlstm_lm.ops.gpu import gpu_of
from xlstm_lm.training.deepspeed_config import Precision


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Peak operations of the device in a second in the type of a run's products; None for unknown devices.

    An fp32 run multiplies in TF32 only where torch is set to.
    """
    gpu = gpu_of(device)
    if gpu is None or precision == "bf16":
        return gpu.bf16_flops if gpu else None
    uses_tf32 = torch.get_float32_matmul_precision() != "highest"
    return gpu.tf32_flops if uses_tf32 and gpu.tf32_flops else gpu.fp32_flops


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Clock of a run: seconds over all its sessions, and seconds of training between two logged steps."""

    def __init__(self, elapsed_before: float) -> None:
        self._start = time.perf_counter() - elapsed_before
        self._window_start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run over all its sessions, including pauses."""
        return time.perf_counter() - self._start

    def restart_window(self) -> float:
        """Return the seconds since the last call, without pauses."""
        now = time.perf_counter()
        seconds, self._window_start = now - self._window_start, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block, such as validation or saving, out of the window."""
        before = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - before


class Progress:
    """Progress of the run: a bar on a terminal, elsewhere a line for each logged step."""

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
        """Count a step. Does not wait for the device."""
        self._step += 1
        if self._bar:
            self._bar.update()

    def go_back(self, step: int) -> None:
        """Continue from an earlier step."""
        self._first, self._step, self._start = step, step, time.perf_counter()
        if self._bar:
            self._bar.n = step
            self._bar.refresh()

    def show(self, loss: float, bits_per_byte: float | None, tokens_per_second: float) -> None:
        """Show the numbers of a logged step."""
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
        """Print a line, above the bar on a terminal."""
        if self._enabled:
            console.write(text)

    def close(self) -> None:
        """Close the bar, if there is one."""
        if self._bar:
            self._bar.close()
