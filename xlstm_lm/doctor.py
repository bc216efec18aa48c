"""What this machine has, which kernel each operation takes on it, and whether each kernel computes what it should."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_lm.ops import mlstm as mlstm_ops
from xlstm_lm.ops import slstm as slstm_ops
from xlstm_lm.ops.conv import causal_conv
from xlstm_lm.ops.loss import linear_cross_entropy
from xlstm_lm.ops.selfcheck import TOLERANCE, compare

PACKAGES = ("xlstm-lm", "torch", "deepspeed", "datasets", "transformers", "tokenizers", "wandb", "triton")


@dataclass(frozen=True)
class Check:
    """How one kernel compares with the definition of its operation."""

    operation: str
    backend: str
    device: str
    dtype: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.error <= self.tolerance


def _mlstm_inputs(device: str, dtype: torch.dtype) -> list[Tensor]:
    batch, length, heads, k, v = 2, 100, 2, 16, 24
    inputs = [torch.randn(batch, length, heads, size, device=device, dtype=dtype) for size in (k, k, v)]
    gates = [torch.randn(batch, length, heads, device=device) + shift for shift in (-1.0, 3.0)]
    return inputs + gates


def _slstm_inputs(device: str, dtype: torch.dtype) -> list[Tensor]:
    batch, length, heads, dim = 2, 70, 2, 24
    shapes = ((batch, length, 4, heads, dim), (4, heads, dim, dim), (4, heads, dim))
    return [
        torch.randn(shape, device=device, dtype=dtype) * scale for shape, scale in zip(shapes, (1, 0.2, 1), strict=True)
    ]


def _resets(inputs: list[Tensor]) -> Tensor:
    """A document starts at 0, in the middle of a chunk, at its border, and at the last token."""
    resets_BT = torch.zeros(inputs[0].shape[:2], dtype=torch.bool, device=inputs[0].device)
    resets_BT[:, [0, 31, 64, -1]] = True
    return resets_BT


def _token_by_token(*inputs: Tensor) -> Tensor:
    """The mLSTM's decode step over a whole sequence."""
    state, steps = None, []
    for index in range(inputs[0].shape[1]):
        step_inputs = [each[:, index : index + 1] for each in inputs]
        h_BTHV, state = mlstm_ops.mlstm(*step_inputs, initial_state=state, return_state=True, backend="step")
        steps.append(h_BTHV)
    return torch.cat(steps, dim=1)


def check_operations(device: str, dtype: torch.dtype = torch.float32) -> list[Check]:
    """Every backend of every operation against its definition in float64, values and gradients, on a small shape."""
    random_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    checks = []
    for name, module, make_inputs in (("mlstm", mlstm_ops, _mlstm_inputs), ("slstm", slstm_ops, _slstm_inputs)):
        inputs = make_inputs(device, dtype)
        with_resets = functools.partial(getattr(module, name), resets=_resets(inputs))
        definition = functools.partial(with_resets, backend="recurrence")
        for backend in module.BACKENDS:
            if backend == "triton" and device == "cpu":
                continue
            if backend == "step":
                checks.append(_check(name, backend, _token_by_token, mlstm_ops.mlstm, inputs, gradients=False))
            else:
                checks.append(
                    _check(name, backend, functools.partial(with_resets, backend=backend), definition, inputs)
                )
    checks.append(_check_loss(device, dtype))
    checks.append(_check_conv(device, dtype))
    torch.random.set_rng_state(random_state)
    return checks


def _check_loss(device: str, dtype: torch.dtype) -> Check:
    inputs = [torch.randn(2, 40, 16, device=device, dtype=dtype), torch.randn(50, 16, device=device, dtype=dtype)]
    targets_BT = torch.randint(0, 50, (2, 40), device=device)

    def plain(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_BTV = 30 * torch.tanh(hidden_BTD @ weight_VD.T / 30)
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def fused(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_BTD, weight_VD, targets_BT, soft_cap=30.0, chunk_tokens=16)

    return _check("loss", "chunked", fused, plain, inputs)


def _check_conv(device: str, dtype: torch.dtype) -> Check:
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in ((2, 40, 6), (6, 4), (6,))]

    def plain(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor) -> Tensor:
        padded_BDT = torch.nn.functional.pad(x_BTD.transpose(1, 2), (3, 0))
        return torch.nn.functional.conv1d(padded_BDT, weight_DW.unsqueeze(1), bias_D, groups=6).transpose(1, 2)

    return _check("causal convolution", "torch", causal_conv, plain, inputs)


def _check(
    operation: str,
    backend: str,
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    gradients: bool = True,
) -> Check:
    device, dtype = inputs[0].device.type, inputs[0].dtype
    error, problem = float("inf"), ""
    try:
        error = compare(function, definition, inputs, gradients)
    except (RuntimeError, ValueError, ImportError) as caught:
        problem = str(caught).strip().splitlines()[0]
    return Check(operation, backend, device, str(dtype).removeprefix("torch."), error, TOLERANCE[dtype], problem)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"CPU: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {capability}"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return lines


def _advice(checks: list[Check]) -> list[str]:
    """What would make this machine faster or right."""
    wrong = [f"{check.operation} / {check.backend}" for check in checks if not check.passed and not check.problem]
    advice = [f"{name} does not compute what it should: do not train with it." for name in wrong]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        advice.append("No C++ compiler: on the CPU the sLSTM takes its slow Python loop. Debian: apt-get install g++.")
    if torch.cuda.is_available() and _version("triton") == "not installed":
        advice.append("A GPU but no Triton: pip install 'xlstm-lm[gpu]'.")
    return advice


def report() -> str:
    """The whole examination as text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32, *([torch.bfloat16] if device == "cuda" else [])]
    checks = [check for dtype in dtypes for check in check_operations(device, dtype)]
    lines = ["Versions", f"  Python {platform.python_version()} on {platform.platform()}"]
    lines += [f"  {package} {_version(package)}" for package in PACKAGES]
    lines += ["", "Devices", *(f"  {line}" for line in _devices()), "", "Kernels (taken by training on this machine)"]
    mlstm_inputs, slstm_inputs = _mlstm_inputs(device, torch.float32), _slstm_inputs(device, torch.float32)
    lines.append(f"  mlstm: {mlstm_ops.choose_backend(*mlstm_inputs)}")
    lines.append(f"  slstm: {slstm_ops.choose_backend(slstm_inputs[0])}")
    lines += ["", "Self-check: values and gradients against the definition in float64"]
    for check in checks:
        verdict = (
            f"not available: {check.problem}"
            if check.problem
            else f"error {check.error:.1e} (allowed {check.tolerance:.0e})"
        )
        mark = "ok  " if check.passed else ("--  " if check.problem else "BAD ")
        lines.append(f"  {mark}{check.operation} / {check.backend}, {check.device}, {check.dtype}: {verdict}")
    advice = _advice(checks)
    lines += ["", "Advice", *(f"  {line}" for line in advice or ["nothing to mend."])]
    return "\n".join(lines)
