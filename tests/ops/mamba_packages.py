"""Small stand-ins for the packages mamba_ssm and causal_conv1d: what they publish, in plain PyTorch, on any device.

They refuse what the kernels refuse, and are written in other forms than our definitions.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.stand_ins import replace_backend
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.selective_scan import SCAN
from xlstm_lm.ops.ssd import SSD

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """u, delta (B, E, L), A (E, N), B and C (B, N, L) -> (B, E, L)."""
    assert u.dtype in KERNEL_TYPES and delta.dtype == B.dtype == C.dtype == u.dtype, "expected one type"
    assert A.dtype == torch.float32 and A.shape[1] <= 256, "expected A in float32, at most 256 states"
    assert u.shape == delta.shape == (u.shape[0], A.shape[0], u.shape[2]), "expected (B, E, L)"
    assert B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2]), "expected (B, N, L)"
    assert D is z is delta_bias is None and not delta_softplus and not return_last_state
    delta, A = delta.double(), A.double()
    state, out = torch.zeros(u.shape[0], *A.shape, dtype=torch.float64), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[:, :, t, None] * A) * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
        out.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(out, dim=2).to(u.dtype)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, **options
):
    """One masked product: y_t = sum_s C_t.B_s e^(A (dt_(s+1) + .. + dt_t)) dt_s x_s over its own document, plus the
    part of the initial state in document 0. x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N), states (B, H, P, N)."""
    assert D is z is dt_bias is None and options == {"return_final_states": True}
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == dt.shape[:2])
    heads = x.shape[2]
    x_type, x, dt, A = x.dtype, x.double(), dt.double(), A.double()
    B, C = (each.double().repeat_interleave(heads // each.shape[2], dim=2) for each in (B, C))
    seq_idx = torch.zeros(dt.shape[:2], dtype=torch.int32) if seq_idx is None else seq_idx
    decay = (dt * A).cumsum(1)  # of the logarithm, since the first step's beginning
    together = (seq_idx[:, :, None] == seq_idx[:, None]).tril()[..., None]
    weights = (decay[:, :, None] - decay[:, None]).masked_fill(~together, -torch.inf).exp()
    y = torch.einsum("bthn,bshn,btsh,bsh,bshp->bthp", C, B, weights, dt, x)
    final = torch.einsum("bshn,bsh,bsh,bshp->bhpn", B, weights[:, -1], dt, x)
    if initial_states is not None:
        assert initial_states.shape == final.shape
        left = decay.masked_fill((seq_idx != 0)[..., None], -torch.inf).exp()
        y = y + torch.einsum("bthn,bth,bhpn->bthp", C, left, initial_states.double())
        final = final + left[:, -1, :, None, None] * initial_states
    return y.to(x_type), final.float()


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None
):
    """x (B, D, L), weight (D, W), bias (D,), seq_idx (B, L) -> (B, D, L)."""
    assert initial_states is None and not return_final_states and activation is None
    if seq_idx is not None or x.stride(2) != 1:
        assert x.stride(1) == 1 and x.stride(2) > 1, "seq_idx is only supported for channel last layout"
        assert x.shape[1] % 8 == 0 and not any(x.stride(each) % 8 for each in (0, 2)), "expected multiples of 8"
    assert x.data_ptr() % 16 == 0 and x.dtype in KERNEL_TYPES and 2 <= weight.shape[1] <= 4
    assert bias is None or bias.dtype == weight.dtype
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    W, L = weight.shape[1], x.shape[2]
    windows = F.pad(x.float(), (W - 1, 0)).unfold(2, L, 1)  # (B, D, W, L): what tap w meets at each position
    if seq_idx is not None:
        documents = F.pad(seq_idx, (W - 1, 0), value=-1).unfold(1, L, 1)
        windows = windows * (documents == seq_idx[:, None])[:, None]
    y = torch.einsum("bdwl,dw->bdl", windows, weight.float())
    return (y if bias is None else y + bias.float()[:, None]).to(x.dtype)


def wrong_in_value(function: Callable) -> Callable:
    """`function` with a little too much of everything."""

    def wrong(*inputs: Tensor, **options: object) -> Tensor | tuple[Tensor, ...]:
        y = function(*inputs, **options)
        return 1.01 * y if isinstance(y, Tensor) else (1.01 * y[0], *y[1:])

    return wrong


def wrong_in_a_gradient(function: Callable) -> Callable:
    """`function` without the gradient of its second input."""

    def wrong(first: Tensor, second: Tensor, *others: Tensor, **options: object) -> Tensor | tuple[Tensor, ...]:
        return function(first, second.detach() + 0 * second, *others, **options)

    return wrong


def broken(function: Callable) -> Callable:
    """In the place of `function` what cannot run here."""

    def fail(*inputs: Tensor, **options: object) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    return fail


def install(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Callable], Callable] = lambda function: function,
    checked_on: tuple[str, ...] = ("cpu", "cuda"),
) -> None:
    """Have the packages be importable for a test, each function `spoil`ed, and their backends run on a CPU, too."""
    functions = {
        "mamba_ssm.ops.selective_scan_interface": selective_scan_fn,
        "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
        "causal_conv1d": causal_conv1d_fn,
    }
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", *functions):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules[name], function.__name__, spoil(function))
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["mamba_ssm"].__spec__ = importlib.machinery.ModuleSpec("mamba_ssm", None)
    for operation, name in ((SCAN, "mamba_ssm"), (SSD, "mamba_ssm"), (CONV, "causal_conv1d")):
        replace_backend(monkeypatch, operation, name, devices=("cpu", "cuda"), checked_on=checked_on)
