"""The mLSTM as the rest of the package calls it: checks what it is given and picks a backend."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.mlstm.chunkwise import mlstm_chunkwise
from xlstm_lm.ops.mlstm.compiled import mlstm_compiled
from xlstm_lm.ops.mlstm.recurrence import State, mlstm_recurrence
from xlstm_lm.ops.mlstm.step import mlstm_step
from xlstm_lm.ops.native import kernels_available
from xlstm_lm.ops.selfcheck import TOLERANCE, compare


def _mlstm_triton(*inputs: Tensor, **options: object) -> tuple[Tensor, State | None]:
    """`triton_op.mlstm_triton`, imported on first use."""
    from xlstm_lm.ops.mlstm.triton_op import mlstm_triton

    return mlstm_triton(*inputs, **options)


BACKENDS: dict[str, Callable[..., tuple[Tensor, State | None]]] = {
    "recurrence": mlstm_recurrence,
    "chunkwise": mlstm_chunkwise,
    "compiled": mlstm_compiled,
    "step": mlstm_step,
}
"""The mLSTM's forms by name: the definition, two to train with (on any device; on a CPU, faster), one to generate with
(one token, no gradient). Where Triton is installed also "triton", to train with on a GPU."""
if importlib.util.find_spec("triton") is not None:
    BACKENDS["triton"] = _mlstm_triton

INPUT_GATES = ("exp", "sigmoid")


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    input_gate: str = "exp",
    normalize: bool = True,
    chunk_length: int | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM cell over a sequence (arXiv 2405.04517, eq. 19-27; sigmoid input gate: arXiv 2503.14376).

    With f' = sigmoid(f), i' = exp(i) or sigmoid(i), and C = n = 0 before the first step, each head computes

        C_t = f'_t C_(t-1) + i'_t k_t v_t^T        n_t = f'_t n_(t-1) + i'_t k_t        q'_t = q_t / sqrt(K)
        h_t = C_t^T q'_t / (max(|n_t . q'_t|, 1) + eps e^m_t)

    in a stabilized form: the state holds C e^-m and n e^-m, where m is the running maximum of the log weights for the
    exp gate, and 0 for the sigmoid gate. Inputs may be views of any strides.

    Args:
        q: queries (B, T, H, K), floating point. k: keys of the same shape. v: values (B, T, H, V). i: input gates (B,
        T, H) before their activation. f: forget gates, likewise; a gate of -inf is refused by no check
            but gives NaN: to empty the state use `resets`. Both are computed in float32 at least.
        resets: (B, T) bool; where True the state before that step is empty. initial_state: (C (B, H, K, V), n (B, H,
        K), m (B, H)) before the first step, as an earlier call returned it. return_state: whether to return the state
        after the last step too, in float32 (float64 for float64 inputs). input_gate: "exp" or "sigmoid". normalize:
        False leaves the denominator away: h_t = C_t^T q'_t as written above (with e^m), for either gate; eps is
            not used.
        chunk_length: steps a chunk of the chunkwise and compiled backends; None picks one.
        eps: added to the stabilized denominator, so that in true units it is eps e^m.
        backend: a name of `BACKENDS`, or "auto" (see `choose_backend`).

    Returns:
        h (B, T, H, V) in the type of v, or (h, state). Gradients reach q, k, v, i, f and C and n of the initial
        state, from h and C and n of the returned one. m carries none: it is a unit, not a value, and handing all
        three on keeps the gradients exact.

    Raises:
        ValueError: shapes, types or names that do not fit, T = 0, or a chunk length below 1.
    """
    _check(q, k, v, i, f, resets, initial_state)
    if input_gate not in INPUT_GATES:
        raise ValueError(f"Unknown input_gate {input_gate!r}: choose one of {', '.join(map(repr, INPUT_GATES))}.")
    if chunk_length is not None and chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1, got {chunk_length}; None picks a good one.")
    if backend == "auto":
        state = () if initial_state is None else initial_state
        backend = choose_backend(q, k, v, i, f, *state)
    elif backend == "compiled" and q.device.type != "cpu":
        raise ValueError(f"The mLSTM backend 'compiled' takes CPU tensors, but q is on {q.device}: choose 'auto'.")
    elif backend not in BACKENDS:
        raise ValueError(
            f"Unknown mLSTM backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}."
        )
    h_BTHV, state = BACKENDS[backend](
        q,
        k,
        v,
        i,
        f,
        resets_BT=resets,
        initial_state=initial_state,
        return_state=return_state,
        input_gate=input_gate,
        normalize=normalize,
        chunk_length=chunk_length,
        eps=eps,
    )
    return (h_BTHV, state) if return_state else h_BTHV


def choose_backend(q_BTHK: Tensor, *others: Tensor) -> str:
    """What "auto" means for such inputs (`others`: k, v, i, f, the state): "step" for one token without gradient, else
    on a CPU "compiled", which is built on first use, and on a GPU "triton", for types that it takes and if it proves
    right there. "chunkwise" where that cannot be and on other devices.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, *others))
    if q_BTHK.shape[1] == 1 and not needs_gradient:
        return "step"
    slow = "the mLSTM runs as batched matrix products in PyTorch (`chunkwise`), which is slower"
    if q_BTHK.device.type == "cpu":
        return "compiled" if kernels_available(slow) else "chunkwise"
    if q_BTHK.device.type == "cuda" and q_BTHK.dtype in TOLERANCE and triton_is_right(q_BTHK.device, q_BTHK.dtype):
        return "triton"
    return "chunkwise"


@torch.compiler.assume_constant_result
@functools.cache
def triton_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels compute the definition on this device, values and gradients; if not, says so.

    Looked at once a process: a compiler that gets them wrong on a newer GPU must not go unnoticed.
    """
    slow = "the mLSTM runs as batched matrix products in PyTorch (`chunkwise`), which is slower"
    if "triton" not in BACKENDS:
        announce_once(f"Triton is not installed (pip install 'xlstm-lm[gpu]'): {slow}")
        return False
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        B, T, H, K, V = 2, 100, 2, 64, 128
        inputs = [torch.randn(B, T, H, size, device=device, dtype=dtype) for size in (K, K, V)]
        inputs += [torch.randn(B, T, H, device=device) + shift for shift in (-1.0, 3.0)]
        resets_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        resets_BT[:, [31, 64, 99]] = True
        ours, definition = (
            functools.partial(mlstm, resets=resets_BT, backend=name) for name in ("triton", "recurrence")
        )
        try:
            error = compare(ours, definition, inputs)
        except Exception as caught:  # whatever a compiler, an assembler or a driver comes up with
            problem = (str(caught).strip() or type(caught).__name__).splitlines()[0]
            announce_once(f"the mLSTM's Triton kernels do not run on {device}, {dtype} ({problem}): {slow}")
            return False
    if not error <= TOLERANCE[dtype]:
        announce_once(f"the mLSTM's Triton kernels are wrong on {device}, {dtype} (error {error:.1e}): {slow}")
        return False
    return True


def _check(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, resets: Tensor | None, initial_state: State | None
) -> None:
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q and v must be (B, T, H, K) and (B, T, H, V), got {tuple(q.shape)} and {tuple(v.shape)}.")
    B, T, H, K = q.shape
    V = v.shape[-1]
    if T == 0:
        raise ValueError("The sequence is empty (T = 0): give at least one step.")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}.")
    expected = {"k": (k, (B, T, H, K)), "v": (v, (B, T, H, V)), "i": (i, (B, T, H)), "f": (f, (B, T, H))}
    if resets is not None:
        expected["resets"] = (resets, (B, T))
        if resets.dtype != torch.bool:
            raise ValueError(f"resets must be bool, got {resets.dtype}.")
    if initial_state is not None:
        if len(initial_state) != 3:
            raise ValueError(f"initial_state must be (C, n, m), got {len(initial_state)} tensors.")
        for name, x, shape in zip("Cnm", initial_state, ((B, H, K, V), (B, H, K), (B, H))):
            expected[f"initial_state {name}"] = (x, shape)
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} to go with q {tuple(q.shape)} and v {tuple(v.shape)}, got {tuple(x.shape)}."
            )
