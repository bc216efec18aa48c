"""The mLSTM's entry for the rest of the package: it checks its arguments and picks a backend."""

from __future__ import annotations

from torch import Tensor

from xlstm_lm.ops.heads import check_shapes, sizes_of
from xlstm_lm.ops.mlstm.operation import MLSTM
from xlstm_lm.ops.mlstm.recurrence import Options, State

INPUT_GATES = ("exp", "sigmoid")


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: tuple[Tensor, ...] | None = None,
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
        q: queries (B, T, H, K), floating point.
        k: keys (B, T, H, K).
        v: values (B, T, H, V).
        i: input gates (B, T, H) before their activation; computed in float32 at least.
        f: forget gates (B, T, H) before their activation; computed in float32 at least. A gate of -inf passes every
            check but gives NaN: to empty the state use `resets`.
        resets: (B, T) bool; where True the state before that step is empty; None for no resets.
        initial_state: (C (B, H, K, V), n (B, H, K), m (B, H)) before the first step, from an earlier call; None for an
            empty one.
        return_state: whether to return the state after the last step too, in float32 (float64 for float64 inputs).
        input_gate: "exp" or "sigmoid".
        normalize: False omits the denominator: h_t = C_t^T q'_t as written above (with e^m), for either gate, without
            eps.
        chunk_length: steps a chunk of the chunkwise and compiled backends; None picks one.
        eps: term added to the stabilized denominator; in true units it is eps e^m.
        overwrite_state: whether C of the initial state may be overwritten with the one returned, as the backends of one
            token do; the caller must not use it afterwards. False leaves the initial state as it was.
        backend: "auto", or the name of a backend of `MLSTM`.

    Returns:
        h (B, T, H, V) in the type of v, or (h, state). Gradients reach q, k, v, i, f and C and n of the initial
        state, from h and C and n of the returned one. m carries none: it is a unit, not a value, and passing all
        three on keeps the gradients exact.

    Raises:
        ValueError: shapes, types or names that do not fit, T = 0, or a chunk length below 1.
    """
    _check(q, k, v, i, f, resets, initial_state)
    if input_gate not in INPUT_GATES:
        raise ValueError(f"Unknown input_gate {input_gate!r}: choose one of {', '.join(map(repr, INPUT_GATES))}.")
    if chunk_length is not None and chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1, got {chunk_length}; None picks a good one.")
    options = Options(chunk_length, input_gate, normalize, eps)
    chosen = MLSTM.backend_for(
        (q, k, v, i, f, *(initial_state or ())),
        backend,
        options=options,
        has_resets=resets is not None,
        one_step=q.shape[1] == 1,
        K=q.shape[-1],
        V=v.shape[-1],
    )
    in_place = {"overwrite_state": overwrite_state} if chosen.one_step else {}
    h_BTHV, state = chosen.loaded(
        q,
        k,
        v,
        i,
        f,
        resets_BT=resets,
        initial_state=initial_state,
        return_state=return_state,
        options=options,
        **in_place,
    )
    return (h_BTHV, state) if return_state else h_BTHV


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    resets: Tensor | None,
    initial_state: tuple[Tensor, ...] | None,
) -> None:
    B, T, H, K, V = sizes_of(q, v)
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, H, V)),
        "i": (i, (B, T, H)),
        "f": (f, (B, T, H)),
    }
    if initial_state is not None:
        if len(initial_state) != 3:
            raise ValueError(f"initial_state must be (C, n, m), got {len(initial_state)} tensors.")
        for name, x, shape in zip("Cnm", initial_state, ((B, H, K, V), (B, H, K), (B, H))):
            expected[f"initial_state {name}"] = (x, shape)
    check_shapes(q, v, resets, expected)
