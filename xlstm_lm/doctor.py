"""Report of this machine: versions, devices, the kernel of each operation, and a check of every kernel."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from xlstm_lm.base.errors import first_line
from xlstm_lm.base.machine import cpu_name, environment, version
from xlstm_lm.ops.backend import Call, Expected, Sample, make_call
from xlstm_lm.ops.native import KernelsUnavailableError
from xlstm_lm.ops.operation import Operation, choose, error_of, why_impossible
from xlstm_lm.ops.operations import OPERATIONS
from xlstm_lm.ops.selfcheck import TOLERANCE, undisturbed
from xlstm_lm.training.deepspeed_config import choose_precision

TYPES = ("float32", "bfloat16", "float16")
OTHERS = ("mamba_ssm", "causal_conv1d")
"""Packages by others. A wrong kernel of theirs is passed over and does not prevent training."""


@dataclass(frozen=True)
class Check:
    """Comparison of one kernel with the definition of its operation."""

    operation: str
    backend: str
    device: str
    dtype: str
    sizes: str
    error: float
    """Largest error of values and gradients, relative to the largest entry of each; infinite if the kernel failed."""
    tolerance: float
    """Largest error that is allowed."""
    problem: str = ""
    """Message of the error that the kernel raised; empty without one."""
    available: bool = True
    """False for a kernel that refuses to run on this machine."""
    ours: bool = True
    """False for a kernel of another package."""

    @property
    def passed(self) -> bool:
        """Whether the kernel ran and its error is allowed."""
        return not self.problem and self.error <= self.tolerance

    @property
    def wrong(self) -> bool:
        """Whether training here is affected: a kernel of xlstm-lm that can run fails or is not accurate."""
        return self.available and not self.passed and self.ours

    @property
    def verdict(self) -> str:
        """Result of the comparison, for the report."""
        if self.problem:
            return f"{'fails' if self.available else 'not available'}: {self.problem}"
        return f"error {self.error:.1e} (allowed {self.tolerance:.0e})"


def calls(operation: Operation, device: str, dtype: torch.dtype) -> list[Call]:
    """Calls that an operation is checked on: odd sizes and, on a GPU, also the sizes that its kernels are made for."""
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    sizes = operation.examples + (operation.gpu_examples if device == "cuda" else ())
    return [make_call(where, dtype, each, operation.options) for each in sizes]


def check_operations(device: str, dtype: torch.dtype = torch.float32) -> Iterator[Check]:
    """Compare every backend that runs on such a device with its definition in float64, values and gradients."""
    for operation in OPERATIONS.values():
        for call in calls(operation, device, dtype):
            for backend in operation.backends:
                if isinstance(why_impossible(operation, backend, call), Expected):
                    continue  # made for other devices
                with undisturbed(call.device):
                    samples = operation.samples(call, backend.name)
                    checks = [_check(operation, backend.name, sample) for sample in samples]
                yield from checks


def _check(operation: Operation, backend: str, sample: Sample) -> Check:
    device, dtype = sample.inputs[0].device.type, sample.inputs[0].dtype
    error, problem, available = float("inf"), "", True
    try:
        error = error_of(operation, backend, sample)
    except Exception as caught:  # anything that a compiler, an assembler or a driver raises
        problem = first_line(caught)
        available = not isinstance(caught, (ValueError, ImportError, KernelsUnavailableError))  # a backend's refusals
    sizes = " x ".join(map(str, sample.inputs[0].shape))
    ours = operation[backend].package not in OTHERS
    return Check(
        operation.name, backend, device, _name(dtype), sizes, error, TOLERANCE[dtype], problem, available, ours
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"CPU: {cpu_name()}, {torch.get_num_threads()} threads, {capability}"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return lines


def _advice(checks: list[Check]) -> list[str]:
    """Advice that makes training on this machine faster or correct, one item a line."""
    wrong = dict.fromkeys(f"{check.operation} / {check.backend}" for check in checks if check.wrong)
    advice = [f"{name} does not compute what it should: do not train with it." for name in wrong]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        advice.append("No C++ compiler: on the CPU the sLSTM runs as a slow Python loop. Debian: apt-get install g++.")
    if torch.cuda.is_available() and version("triton") is None:
        advice.append("A GPU but no Triton: pip install 'xlstm-lm[gpu]'.")
    return advice


def examine(say: Callable[[str], None], dtypes: list[torch.dtype] | None = None) -> bool:
    """Examine this machine and return whether no kernel is wrong.

    Args:
        say: Called with each line of the report as soon as it is ready.
        dtypes: Types in which kernels are checked; None or empty for the type of training with training.precision
            auto, float32, and on a GPU bfloat16 and float16.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision("auto", torch.device(device))
    training = torch.bfloat16 if precision == "bf16" else torch.float32
    others = [torch.bfloat16, torch.float16] if device == "cuda" else []
    dtypes = dtypes or list(dict.fromkeys([training, torch.float32, *others]))
    here = environment(torch.device(device))
    say(f"Versions\n  Python {here['python']} on {here['platform']}")
    for name, number in (here["versions"] | {"assembler for GPUs (ptxas)": here["assembler"]}).items():
        say(f"  {name} {number or 'not installed'}")
    say("\nDevices")
    for line in _devices():
        say(f"  {line}")
    say(f"\nKernels (training on this machine takes those for {_name(training)}: precision auto is {precision})")
    for dtype in dtypes:
        for operation in OPERATIONS.values():
            for call in calls(operation, device, dtype):
                sizes = "".join(f", {letter} {size}" for letter, size in call.sizes)
                say(f"  {operation.name}{sizes}, {_name(dtype)}: {choose(operation, call).backend}")
                if any(backend.one_step for backend in operation.backends):
                    token = call._replace(one_step=True, needs_gradient=False)
                    say(f"  {operation.name} for one token{sizes}, {_name(dtype)}: {choose(operation, token).backend}")
    say("\nSelf-check: values and gradients against the definition in float64")
    checks = []
    for check in (each for dtype in dtypes for each in check_operations(device, dtype)):
        checks.append(check)
        mark = "ok  " if check.passed else "BAD " if check.wrong else "--  "
        kernel = f"{check.operation} / {check.backend}, {check.device}, {check.dtype}, {check.sizes}"
        say(f"  {mark}{kernel}: {check.verdict}")
    say("\nAdvice")
    for line in _advice(checks) or ["nothing to fix."]:
        say(f"  {line}")
    return not any(check.wrong for check in checks)


def main(types: Sequence[str] = ()) -> None:
    """Print the report of this machine.

    Args:
        types: Types in which kernels are checked, of `TYPES`; empty for the default of `examine`.

    Raises:
        ValueError: a type is unknown.
        SystemExit: with code 1, if a kernel fails or differs from its definition.
    """
    unknown = [name for name in types if name not in TYPES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no type to check kernels in; there are {', '.join(TYPES)}.")
    if not examine(functools.partial(print, flush=True), [getattr(torch, name) for name in types]):
        raise SystemExit(1)
