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
from xlstm_lm.ops.mlstm.triton_launch import super_chunks_of
from xlstm_lm.ops.native import kernels_available
from xlstm_lm.ops.selfcheck import (
    TOLERANCE,
    asked_once,
    from_state_to_state,
    mlstm_inputs_and_state,
    some_resets,
    what_is_wrong,
)


def _mlstm_triton(*inputs: Tensor, **options: object) -> tuple[Tensor, State | None]:
    """`triton_op.mlstm_triton`, imported on first use."""
    from xlstm_lm.ops.mlstm.triton_op import mlstm_triton

    return mlstm_triton(*inputs, **options)


def _mlstm_triton_step(*inputs: Tensor, **options: object) -> tuple[Tensor, State | None]:
    """`triton_step.mlstm_triton_step`, imported on first use."""
    from xlstm_lm.ops.mlstm.triton_step import mlstm_triton_step

    return mlstm_triton_step(*inputs, **options)


BACKENDS: dict[str, Callable[..., tuple[Tensor, State | None]]] = {
    "recurrence": mlstm_recurrence,
    "chunkwise": mlstm_chunkwise,
    "compiled": mlstm_compiled,
    "step": mlstm_step,
}
"""The mLSTM's forms by name: the definition, two to train with (on any device; on a CPU, faster), one to generate with
(one token, no gradient). Where Triton is installed also "triton", to train with on a GPU, and "triton_step", to
generate with there."""
if importlib.util.find_spec("triton") is not None:
    BACKENDS |= {"triton": _mlstm_triton, "triton_step": _mlstm_triton_step}
STEPS = ("step", "triton_step")
"""The backends that take one token and have no gradient."""
SLOWER = {
    "chunkwise": "as batched matrix products in PyTorch (`chunkwise`)",
    "step": "token by token in PyTorch (`step`)",
}
"""What runs where a faster backend does not, for people."""

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
    overwrite_state: bool = False,
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
        overwrite_state: whether C of the initial state may be overwritten with the one returned, as the backends of one
            token do; the caller's is then worth nothing. False leaves the initial state as it was.
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
        kind = {"input_gate": input_gate, "normalize": normalize, "has_resets": resets is not None}
        backend = choose_backend(q, k, v, i, f, *state, **kind)
    elif backend == "compiled" and q.device.type != "cpu":
        raise ValueError(f"The mLSTM backend 'compiled' takes CPU tensors, but q is on {q.device}: choose 'auto'.")
    elif backend not in BACKENDS:
        raise ValueError(
            f"Unknown mLSTM backend {backend!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}."
        )
    in_place = {"overwrite_state": overwrite_state} if backend in STEPS else {}
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
        **in_place,
    )
    return (h_BTHV, state) if return_state else h_BTHV


def choose_backend(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *others: Tensor,
    input_gate: str = "exp",
    normalize: bool = True,
    has_resets: bool = True,
) -> str:
    """What "auto" means for such inputs (`others`: i, f, the state), with resets or without.

    On a GPU "triton", or "triton_step" for one token without gradient, for types that they take and where they prove
    right. Elsewhere "step" for one token without gradient, else on a CPU "compiled", which is built on first use, and
    "chunkwise" where that cannot be and on other devices.
    """
    inputs = (q_BTHK, k_BTHK, v_BTHV, *others)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    one_step = q_BTHK.shape[1] == 1 and not needs_gradient
    plain, triton = ("step", "triton_step") if one_step else ("chunkwise", "triton")
    if torch.compiler.is_exporting():  # the program is to run without our kernels and our hand-written backward
        return "recurrence" if needs_gradient else plain
    if q_BTHK.device.type == "cuda" and all(x.dtype in TOLERANCE for x in inputs):
        sizes = q_BTHK.shape[-1], v_BTHV.shape[-1]
        options = input_gate, normalize, has_resets or one_step
        return triton if triton_is_right(triton, q_BTHK.device, q_BTHK.dtype, *sizes, *options) else plain
    if q_BTHK.device.type == "cpu" and not one_step:
        return "compiled" if kernels_available(f"the mLSTM runs {SLOWER[plain]}, which is slower") else plain
    return plain


@asked_once
def triton_is_right(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    K: int,
    V: int,
    input_gate: str,
    normalize: bool,
    has_resets: bool,
) -> bool:
    """Whether "triton" or "triton_step" computes the definition on this device, values and (not the step) gradients; if
    not, says so.

    Looked at once a process for all that other kernels are compiled for: a compiler that gets them wrong on a newer GPU
    must not go unnoticed.
    """
    slow = f"the mLSTM runs {SLOWER['step' if backend in STEPS else 'chunkwise']}, which is slower"
    if backend not in BACKENDS:
        announce_once(f"Triton is not installed (pip install 'xlstm-lm[gpu]'): {slow}")
        return False

    def prepare() -> tuple[Callable, Callable, list[Tensor]]:
        inputs = mlstm_inputs_and_state(device, dtype, H=2, K=K, V=V)
        resets = some_resets(inputs) if has_resets else None
        options = {"resets": resets, "input_gate": input_gate, "normalize": normalize}
        kernels = functools.partial(_token_by_token if backend in STEPS else mlstm, backend=backend, **options)
        definition = functools.partial(mlstm, backend="recurrence", **options)
        return from_state_to_state(kernels), from_state_to_state(definition), inputs

    with super_chunks_of(2):
        found = what_is_wrong(prepare, device, dtype, gradients=backend not in STEPS)
    if found is not None:
        verdict, reason = found
        heads = f"heads of {K} x {V}, {dtype}"
        announce_once(f"the mLSTM's Triton kernels (`{backend}`) {verdict} on {device} for {heads} ({reason}): {slow}")
    return found is None


def _token_by_token(*inputs: Tensor, resets: Tensor, initial_state: State, **options: object) -> tuple[Tensor, State]:
    """`mlstm` through a backend of `STEPS`, as in generation: with resets only where there is one."""
    h_BTHV, state = [], initial_state
    for *step, resets_B1 in zip(*(x.split(1, dim=1) for x in (*inputs, resets))):
        options["resets"] = resets_B1 if resets_B1.any() else None
        h_B1HV, state = mlstm(*step, initial_state=state, overwrite_state=bool(h_BTHV), **options)
        h_BTHV.append(h_B1HV)
    return torch.cat(h_BTHV, 1), state


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
