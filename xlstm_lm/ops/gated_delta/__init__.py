"""The gated delta rule: a linear attention that erases what a key held before it writes (arXiv 2412.06464)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.backend import COUNTED_CHUNK, Backend, Call, Cost, Sample
from xlstm_lm.ops.heads import check_shapes, sizes_of
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import TOLERANCE, Checked, some_resets

CHUNK_LENGTH = 64
FORGOTTEN = -40.0
"""Logarithm of the decay that stands for a reset in fla's kernels, which have none: e^-40 of a state is nothing beside
any number in float32, and sums of it over a chunk are still exact to 1e-4."""


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk_length: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated delta rule over a sequence (arXiv 2412.06464, eq. 10). Each head computes

        C_t = a_t (C_(t-1) - beta_t k_t (k_t^T C_(t-1))) + beta_t k_t v_t^T        h_t = C_t^T q_t / sqrt(K)

    with a_t = e^log_decay_t.

    Args:
        q: queries (B, T, H, K), floating point, usually of length 1.
        k: keys (B, T, H, K), of length 1 at most, for otherwise the state grows.
        v: values (B, T, H, V).
        log_decay: logarithms of the decays (B, T, H), 0 at most. Computed in float32 at least.
        beta: write strengths (B, T, H) between 0 and 1. Computed in float32 at least.
        resets: (B, T) bool, true where the state before the step is empty; None for no resets.
        initial_state: C before the first step (B, H, K, V); None for an empty one.
        return_state: whether to return the state after the last step too, in float32 at least.
        chunk_length: steps in a chunk of the chunkwise backend; None for 64.
        backend: "auto" or the name of a backend of `GATED_DELTA`.

    Returns:
        h (B, T, H, V) in the type of v, or (h, state). Gradients reach all floating-point inputs, also from the state.

    Raises:
        ValueError: shapes or types that do not fit, T = 0, a chunk length below 1, or an unknown backend.
    """
    _check(q, k, v, log_decay, beta, resets, initial_state)
    if chunk_length is not None and chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1, got {chunk_length}; None chooses {CHUNK_LENGTH}.")
    B, _, H, K = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    C_BHKV = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    inputs = (q, k, v, log_decay, beta)
    chosen = GATED_DELTA.backend_for(
        (*inputs, initial_state), backend, has_resets=resets is not None, one_step=q.shape[1] == 1, K=K, V=v.shape[-1]
    )
    h_BTHV, C_BHKV = chosen.loaded(*inputs, resets, C_BHKV, chunk_length or CHUNK_LENGTH)
    h_BTHV = h_BTHV.to(v.dtype)
    return (h_BTHV, C_BHKV) if return_state else h_BTHV


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    B, T, H, K, V = sizes_of(q, v)
    if q.numel() == 0:
        raise ValueError(f"q is {tuple(q.shape)}; B, H and K must be at least 1.")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, H, V)),
        "log_decay": (log_decay, (B, T, H)),
        "beta": (beta, (B, T, H)),
    }
    if initial_state is not None:
        expected["initial_state"] = (initial_state, (B, H, K, V))
    check_shapes(q, v, resets, expected)


def gated_delta_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    resets_BT: Tensor | None,
    C_BHKV: Tensor,
    chunk_length: int,
) -> tuple[Tensor, Tensor]:
    """The kernels of the package fla, with its own chunk length."""
    # Not an import: this file goes with exports, and transformers refuses code whose imports are not installed.
    chunk_gated_delta_rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    del chunk_length
    if resets_BT is not None:
        log_decay_BTH = log_decay_BTH.masked_fill(resets_BT[..., None], FORGOTTEN)
    dtype = v_BTHV.dtype
    return chunk_gated_delta_rule(
        q_BTHK.to(dtype),
        k_BTHK.to(dtype),
        v_BTHV,
        log_decay_BTH.float(),
        beta_BTH.float(),
        initial_state=C_BHKV,
        output_final_state=True,
    )


def gated_delta_inputs(
    device: torch.device | str, dtype: torch.dtype, *, B: int, T: int, H: int, K: int, V: int
) -> list[Tensor]:
    """q, k, v, logarithms of decays, write strengths and a state; all but q, k and v in float32 at least."""
    gates = torch.promote_types(dtype, torch.float32)
    q, k, v = (torch.randn(B, T, H, width, device=device, dtype=dtype) for width in (K, K, V))
    log_decay, beta = (torch.randn(B, T, H, device=device, dtype=gates) for _ in range(2))
    state = torch.randn(B, H, K, V, device=device, dtype=gates)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -F.softplus(log_decay), beta.sigmoid(), state]


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """A sequence of five chunks and a rest, from a state: 325 steps."""
    sizes = {"B": 2, "T": 5 * 64 + 5, "H": 2, "K": call.size("K"), "V": call.size("V")}
    inputs = gated_delta_inputs(call.device, call.dtype, **sizes)
    resets_BT = some_resets(inputs) if call.has_resets else None
    yield Sample(inputs, {"resets": resets_BT}, "recurrence")


def run(backend: Backend, sample: Sample) -> Checked:
    """h and the last state as a function of q, k, v, the gates and the first state."""

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *others, C_BHKV = inputs
        return backend.loaded(*others, sample.options["resets"], C_BHKV, CHUNK_LENGTH)

    return function


def cost(*, B: int, T: int, H: int, K: int, V: int, L: int = COUNTED_CHUNK, itemsize: int = 2) -> Cost:
    """Products in chunks of L and with the state; q, k, v and gates read and h written once.

    Within a chunk, a head takes 2 L K for the causal halves of K K^T and Q K^T, L (K + V) for the triangular solve,
    L V for the scores' product and 6 L for gates; three products with the state take 2 K V each.
    """
    L = min(L, T)
    flops = B * T * H * (L * (3 * K + 2 * V) + 6 * K * V + 6 * L)
    return Cost(flops, B * T * H * (itemsize * (2 * K + 2 * V) + 2 * 4))


def kept(*, H: int, K: int, V: int, device: str, **sizes: int) -> float:
    """On a CPU the states every 32 steps, in float32."""
    del sizes
    return 4 * H * K * V / 32 if device == "cpu" else 0.0


GATED_DELTA = Operation(
    name="gated_delta",
    title="the gated delta rule",
    subject="q",
    backends=(
        Backend(
            name="fla",
            function="xlstm_lm.ops.gated_delta:gated_delta_fla",
            devices=("cuda",),
            dtypes=tuple(TOLERANCE),
            package="fla",
            exports=lambda call: False,
            checked_on=("cuda",),
            limits=lambda call: None if call.size("K") <= 256 else f"it has heads of 256 at most, not {call.size('K')}",
        ),
        Backend(
            name="compiled",
            function="xlstm_lm.ops.gated_delta.compiled:gated_delta_compiled",
            devices=("cpu",),
            native=True,
            exports=lambda call: False,
        ),
        Backend(
            name="chunkwise",
            function="xlstm_lm.ops.gated_delta.chunkwise:gated_delta_chunkwise",
            exports=lambda call: not call.needs_gradient,
            slow="as batched matrix products in PyTorch",
        ),
        Backend(
            name="recurrence",
            function="xlstm_lm.ops.gated_delta.recurrence:gated_delta_recurrence",
            slow="step by step in Python",
        ),
    ),
    samples=samples,
    run=run,
    cost=cost,
    kept=kept,
    identity="KV",
    examples=({"K": 16, "V": 24},),
    gpu_examples=({"K": 128, "V": 256},),
)
