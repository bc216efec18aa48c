"""What this machine has, which kernel each operation takes on it, and whether each kernel computes what it should."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from xlstm_lm.base.machine import cpu_name
from xlstm_lm.ops import attention as attention_ops
from xlstm_lm.ops import conv as conv_ops
from xlstm_lm.ops import mlstm as mlstm_ops
from xlstm_lm.ops import selective_scan as scan_ops
from xlstm_lm.ops import slstm as slstm_ops
from xlstm_lm.ops import ssd as ssd_ops
from xlstm_lm.ops.assembler import compilers
from xlstm_lm.ops.loss import linear_cross_entropy
from xlstm_lm.ops.native import KernelsUnavailableError
from xlstm_lm.ops.selfcheck import (
    TOLERANCE,
    Checked,
    compare,
    mlstm_inputs,
    scan_inputs,
    slstm_inputs,
    some_resets,
    ssd_inputs,
    with_states,
)
from xlstm_lm.training.deepspeed_config import choose_precision

TYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("xlstm-lm", "torch", "deepspeed", "datasets", "transformers", "tokenizers", "wandb", "triton")
PACKAGES += ("mamba-ssm", "causal-conv1d")
OTHERS = ("mamba_ssm", "causal_conv1d")
"""Backends that are not ours, and not taken where they are wrong: so a wrong one is no reason not to train."""
ON_A_GPU = ("triton", "triton_step", "cluster", "jagged", *OTHERS)
RUNS_ON = {"compiled": ("cpu",)} | dict.fromkeys(ON_A_GPU, ("cuda",))
"""The devices of the backends that do not run everywhere."""
SIZES = {
    "cpu": {"mlstm": [{}], "slstm": [{}], "ssd": {"T": 100, "P": 24, "G": 2, "N": 16}},
    "cuda": {
        "mlstm": [{}, {"T": 600, "K": 128, "V": 256}],
        "slstm": [{}, *({"T": 150, "D": D} for D in (64, 128, 256)), {"B": 600, "T": 6, "D": 64}],
        "ssd": {},
    },
}
"""What the cells are checked on: odd sizes everywhere, on a GPU also those that its kernels are made for, and a batch
of which the sLSTM's take more rows at a time."""


@dataclass(frozen=True)
class Check:
    """How one kernel compares with the definition of its operation."""

    operation: str
    backend: str
    device: str
    dtype: str
    sizes: str
    error: float
    tolerance: float
    problem: str = ""
    """What it raised, if it did."""
    available: bool = True
    """False where it says itself that it cannot run here."""

    @property
    def passed(self) -> bool:
        return not self.problem and self.error <= self.tolerance

    @property
    def wrong(self) -> bool:
        return self.available and not self.passed and self.backend not in OTHERS

    @property
    def verdict(self) -> str:
        if self.problem:
            return f"{'fails' if self.available else 'not available'}: {self.problem}"
        return f"error {self.error:.1e} (allowed {self.tolerance:.0e})"


def _token_by_token(backend: str, *inputs: Tensor) -> Tensor:
    """One of the mLSTM's decode steps over a whole sequence."""
    state, steps = None, []
    for index in range(inputs[0].shape[1]):
        step_inputs = [each[:, index : index + 1] for each in inputs]
        h_BTHV, state = mlstm_ops.mlstm(*step_inputs, initial_state=state, return_state=True, backend=backend)
        steps.append(h_BTHV)
    return torch.cat(steps, dim=1)


def check_operations(device: str, dtype: torch.dtype = torch.float32) -> Iterator[Check]:
    """Every backend that such a device can run against the definition in float64, values and gradients."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        for sizes in SIZES[device]["mlstm"]:
            yield from _check_cell("mlstm", mlstm_ops, mlstm_ops.mlstm, mlstm_inputs(device, dtype, **sizes))
        for sizes in SIZES[device]["slstm"]:
            yield from _check_cell("slstm", slstm_ops, slstm_ops.slstm, slstm_inputs(device, dtype, **sizes))
        scan, ssd = with_states(scan_ops.selective_scan), with_states(ssd_ops.ssd)
        yield from _check_cell("selective scan", scan_ops, scan, scan_inputs(device, dtype))
        yield from _check_cell("ssd", ssd_ops, ssd, ssd_inputs(device, dtype, **SIZES[device]["ssd"]))
        yield from _check_attention(device, dtype)
        yield _check_loss(device, dtype)
        yield from _check_conv(device, dtype)


def _check_cell(name: str, module: ModuleType, function: Checked, inputs: list[Tensor]) -> Iterator[Check]:
    """The backends of one recurrence on one set of inputs."""
    device = inputs[0].device.type
    with_resets = functools.partial(function, resets=some_resets(inputs))
    definition = functools.partial(with_resets, backend="recurrence")
    for backend in module.BACKENDS:
        if device not in RUNS_ON.get(backend, (device,)):
            continue
        if backend in mlstm_ops.STEPS:
            token_by_token = functools.partial(_token_by_token, backend)
            yield _check(name, backend, token_by_token, mlstm_ops.mlstm, inputs, gradients=False)
        else:
            yield _check(name, backend, functools.partial(with_resets, backend=backend), definition, inputs)


def _check_attention(device: str, dtype: torch.dtype) -> Iterator[Check]:
    inputs = [torch.randn(2, 100, heads, 16, device=device, dtype=dtype) for heads in (4, 2, 2)]
    resets_BT = some_resets(inputs)
    packing = attention_ops.pack(2, 100, inputs[0].device, resets_BT)
    apart_BTS = resets_BT.cumsum(1)[:, :, None] != resets_BT.cumsum(1)[:, None]
    hidden_B1TS = (apart_BTS | ~torch.ones_like(apart_BTS[0]).tril())[:, None]

    def plain(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        k_BTHK, v_BTHK = (each.repeat_interleave(2, dim=2) for each in (k_BTGK, v_BTGK))
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / 4
        return torch.einsum("bhts,bshk->bthk", scores_BHTS.masked_fill(hidden_B1TS, -torch.inf).softmax(-1), v_BTHK)

    for backend in attention_ops.BACKENDS:
        if device in RUNS_ON.get(backend, (device,)):
            function = functools.partial(attention_ops.attention, packing=packing, backend=backend)
            yield _check("attention", backend, function, plain, inputs)


def _check_loss(device: str, dtype: torch.dtype) -> Check:
    inputs = [torch.randn(2, 40, 16, device=device, dtype=dtype), torch.randn(50, 16, device=device, dtype=dtype)]
    targets_BT = torch.randint(0, 50, (2, 40), device=device)

    def plain(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_BTV = 30 * torch.tanh(hidden_BTD @ weight_VD.T / 30)
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def fused(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_BTD, weight_VD, targets_BT, soft_cap=30.0, chunk_tokens=16)

    return _check("loss", "chunked", fused, plain, inputs)


def _check_conv(device: str, dtype: torch.dtype) -> Iterator[Check]:
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in ((2, 70, 8), (8, 4), (8,))]
    resets_BT = some_resets(inputs)
    document_BT = resets_BT.cumsum(1)

    def plain(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor) -> Tensor:
        rows = []
        for x_TD, document_T in zip(x_BTD, document_BT, strict=True):
            documents = x_TD.T.split(document_T.unique_consecutive(return_counts=True)[1].tolist(), dim=1)
            padded = (torch.nn.functional.pad(document_DT, (3, 0)) for document_DT in documents)
            rows.append([torch.conv1d(each, weight_DW[:, None], bias_D, groups=8) for each in padded])
        return torch.stack([torch.cat(row, dim=1).T for row in rows])

    for backend in conv_ops.BACKENDS:
        if device in RUNS_ON.get(backend, (device,)):
            function = functools.partial(conv_ops.causal_conv, resets_BT=resets_BT, backend=backend)
            yield _check("causal convolution", backend, function, plain, inputs)


def _check(
    operation: str,
    backend: str,
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    gradients: bool = True,
) -> Check:
    device, dtype = inputs[0].device.type, inputs[0].dtype
    error, problem, available = float("inf"), "", True
    try:
        error = compare(function, definition, inputs, gradients)
    except Exception as caught:  # whatever a compiler, an assembler or a driver comes up with
        problem = (str(caught).strip() or type(caught).__name__).splitlines()[0]
        available = not isinstance(caught, (ValueError, KernelsUnavailableError))  # a backend's own refusals
    sizes = " x ".join(map(str, inputs[0].shape))
    return Check(operation, backend, device, _name(dtype), sizes, error, TOLERANCE[dtype], problem, available)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"CPU: {cpu_name()}, {torch.get_num_threads()} threads, {capability}"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
        ptxas = compilers(torch.device("cuda", index))["ptxas"]
        lines[-1] += f", Triton assembles with ptxas {ptxas}" if ptxas else ""
    return lines


def _advice(checks: list[Check]) -> list[str]:
    """What would make this machine faster or right."""
    wrong = dict.fromkeys(f"{check.operation} / {check.backend}" for check in checks if check.wrong)
    advice = [f"{name} does not compute what it should: do not train with it." for name in wrong]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        advice.append("No C++ compiler: on the CPU the sLSTM takes its slow Python loop. Debian: apt-get install g++.")
    if torch.cuda.is_available() and _version("triton") == "not installed":
        advice.append("A GPU but no Triton: pip install 'xlstm-lm[gpu]'.")
    return advice


def examine(say: Callable[[str], None], dtypes: list[torch.dtype] | None = None) -> bool:
    """Examine this machine, giving `say` each line as soon as it is known. False where a kernel is wrong or fails.

    Kernels are checked in `dtypes`; by default in that of training here (with training.precision auto), in float32, in
    which everything else computes, and on a GPU in float16.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision("auto", torch.device(device))
    training = torch.bfloat16 if precision == "bf16" else torch.float32
    others = [torch.bfloat16, torch.float16] if device == "cuda" else []
    dtypes = dtypes or list(dict.fromkeys([training, torch.float32, *others]))
    say(f"Versions\n  Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        say(f"  {package} {_version(package)}")
    say("\nDevices")
    for line in _devices():
        say(f"  {line}")
    say(f"\nKernels (training on this machine takes those for {_name(training)}: precision auto is {precision})")
    for dtype in dtypes:
        inputs = [each.requires_grad_() for each in mlstm_inputs(device, dtype)]
        say(f"  mlstm, {_name(dtype)}: {mlstm_ops.choose_backend(*inputs)}")
        one_token = [each[:, :1].detach() for each in inputs]
        say(f"  mlstm for one token, {_name(dtype)}: {mlstm_ops.choose_backend(*one_token)}")
        for sizes in SIZES[device]["slstm"]:
            wx = slstm_inputs(device, dtype, **sizes)[0]
            say(f"  slstm with heads of {wx.shape[-1]}, {_name(dtype)}: {slstm_ops.choose_backend(wx)}")
        x, _, a, *_ = scan_inputs(device, dtype)
        say(f"  selective scan, {_name(dtype)}: {scan_ops.choose_backend(x, a)}")
        say(f"  ssd, {_name(dtype)}: {ssd_ops.choose_backend(ssd_inputs(device, dtype)[0])}")
        say(f"  causal convolution, {_name(dtype)}: {conv_ops.choose_backend(x, torch.empty(x.shape[-1], 4))}")
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
    """Print the examination, in the `types` of `TYPES`, where given.

    Raises:
        ValueError: a type is not known.
        SystemExit: with code 1, where a kernel fails or computes something else than its definition.
    """
    unknown = [name for name in types if name not in TYPES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no type to check kernels in; there are {', '.join(TYPES)}.")
    if not examine(functools.partial(print, flush=True), [getattr(torch, name) for name in types]):
        raise SystemExit(1)
