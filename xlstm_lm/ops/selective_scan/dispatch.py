"""One entry for the selective scan, which picks the fastest form there is."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.native import kernels_available
from xlstm_lm.ops.selective_scan.compiled import scan_compiled
from xlstm_lm.ops.selective_scan.mamba_ssm import scan_mamba_ssm
from xlstm_lm.ops.selective_scan.recurrence import Result, scan_recurrence
from xlstm_lm.ops.selfcheck import TOLERANCE, asked_once, proves_right, scan_inputs, some_resets, with_states

BACKENDS: dict[str, Callable[..., Result]] = {"recurrence": scan_recurrence, "compiled": scan_compiled}
"""Every implementation by its name; all take the arguments of `selective_scan` but `backend`. Where the package
mamba_ssm is installed also its own, for a GPU."""
if importlib.util.find_spec("mamba_ssm") is not None:
    BACKENDS["mamba_ssm"] = scan_mamba_ssm
SLOW = "Mamba-1's selective scan runs step by step in Python (`recurrence`), which is far slower"


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    a_EN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Result:
    """s_t = e^(dt_t a) s_(t-1) + dt_t b_t x_t and y_t = c_t . s_t, for each of E units with N states (arXiv 2312.00752,
    eq. 2 with the discretization of its reference implementation).

    Args:
        x_BTE: inputs (B, T, E). dt_BTE: step sizes, above 0. a_EN: decays, below 0. b_BTN, c_BTN: (B, T, N). dt and a
            are taken in float32 at least.
        resets: (B, T) bool, true where the state before the step is empty. initial_state: (B, E, N) or None for an
            empty one. return_state: whether to return the last one, in float32 at least.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, E) in x's type, and the last state or None.

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "auto":
        backend = choose_backend(x_BTE, a_EN)
    elif backend == "compiled" and x_BTE.device.type != "cpu":
        raise ValueError(f"the backend 'compiled' takes CPU tensors, but x is on {x_BTE.device}; choose 'auto'")
    elif backend not in BACKENDS:
        raise ValueError(
            f"unknown selective scan backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    dtype = torch.promote_types(x_BTE.dtype, torch.float32)
    return BACKENDS[backend](
        x_BTE,
        dt_BTE.to(dtype),
        a_EN.to(dtype),
        b_BTN,
        c_BTN,
        resets_BT=resets,
        initial_state_BEN=initial_state,
        return_state=return_state,
    )


def choose_backend(x_BTE: Tensor, a_EN: Tensor) -> str:
    """What "auto" means for such inputs: "compiled" on a CPU, which is built on first use; "mamba_ssm" on a GPU where
    that package is installed and proves right; else, and for a single step on a GPU, "recurrence"."""
    device, N = x_BTE.device, a_EN.shape[1]
    if device.type == "cpu":
        return "compiled" if kernels_available(SLOW) else "recurrence"
    if x_BTE.shape[1] == 1:
        return "recurrence"
    if device.type == "cuda" and "mamba_ssm" in BACKENDS and x_BTE.dtype in TOLERANCE:
        return "mamba_ssm" if _mamba_ssm_is_right(device, x_BTE.dtype, N) else "recurrence"
    announce_once(f"no fused selective scan for {x_BTE.dtype} on {device.type} (on a GPU, install mamba_ssm): {SLOW}")
    return "recurrence"


@asked_once
def _mamba_ssm_is_right(device: torch.device, dtype: torch.dtype, N: int) -> bool:
    """Whether mamba_ssm's scan computes the definition on this device, values and gradients; if not, says so."""

    def prepare() -> tuple[Callable, Callable, list[Tensor]]:
        inputs = scan_inputs(device, dtype, N=N)
        run = functools.partial(with_states(selective_scan), resets=some_resets(inputs))
        return *(functools.partial(run, backend=name) for name in ("mamba_ssm", "recurrence")), inputs

    kernel, sizes = "mamba_ssm's selective scan", f", {N} states"
    return proves_right(prepare, device, dtype, kernel=kernel, sizes=sizes, instead=SLOW)
