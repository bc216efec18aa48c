"""Mamba-2's state space (SSD): a linear recurrence with one decay a head and step, which the mLSTM's kernels compute.

Without its normalizer, the mLSTM is h_t = (sum_s e^(i_s) prod_(r > s) sigmoid(f_r) k_s v_s^T)^T q_t. SSD is therefore
an mLSTM with q = C, k = B, v = x, e^i = dt and sigmoid(f) = e^(dt A). Every speed-up of one serves the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_lm.ops.backend import COUNTED_CHUNK, Backend, Call, Cost, Sample, linear_attention_flops
from xlstm_lm.ops.compiling import not_compiled
from xlstm_lm.ops.mlstm import MLSTM, mlstm
from xlstm_lm.ops.operation import Operation
from xlstm_lm.ops.selfcheck import TOLERANCE, Checked, some_resets

Result = tuple[Tensor, Tensor | None]


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    *,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Result:
    """S_t = e^(dt_t a) S_(t-1) + dt_t b_t x_t^T and y_t = S_t^T c_t for each head (arXiv 2405.21060, section 2).

    Args:
        x_BTHP: inputs (B, T, H, P).
        dt_BTH: step sizes, above 0; computed in float32 at least, as a_H is.
        a_H: decays, below 0.
        b_BTGN, c_BTGN: (B, T, G, N) where G divides H: each group serves H / G heads.
        resets: (B, T) bool, true where the state before the step is empty; None for no resets.
        initial_state: (B, H, N, P); None for an empty one.
        return_state: whether to return the last state, in float32 at least.
        backend: "auto" or the name of a backend of `SSD`.

    Returns:
        y (B, T, H, P) in x's type, and the last state or None.

    Raises:
        ValueError: an unknown backend.
    """
    chosen = SSD.backend_for(
        (x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, initial_state),
        backend,
        has_resets=resets is not None,
        P=x_BTHP.shape[-1],
        N=b_BTGN.shape[-1],
    )
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    return chosen.loaded(x_BTHP, dt_BTH.to(dtype), a_H.to(dtype), b_BTGN, c_BTGN, resets, initial_state, return_state)


def _recurrence(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    resets_BT: Tensor | None,
    state_BHNP: Tensor | None,
    return_state: bool,
) -> Result:
    """Step by step: the definition."""
    b_BTHN, c_BTHN = (for_each_head(each, x_BTHP.shape[2]).to(dt_BTH.dtype) for each in (b_BTGN, c_BTGN))
    if state_BHNP is None:
        state_BHNP = dt_BTH.new_zeros(x_BTHP.shape[0], x_BTHP.shape[2], b_BTGN.shape[3], x_BTHP.shape[3])
    decay_BTH = torch.exp(dt_BTH * a_H)
    steps = []
    for t in range(x_BTHP.shape[1]):
        if resets_BT is not None:
            state_BHNP = state_BHNP.masked_fill(resets_BT[:, t, None, None, None], 0)
        update_BHNP = b_BTHN[:, t, :, :, None] * (dt_BTH[:, t, :, None] * x_BTHP[:, t])[:, :, None]
        state_BHNP = decay_BTH[:, t, :, None, None] * state_BHNP + update_BHNP
        steps.append((state_BHNP * c_BTHN[:, t, :, :, None]).sum(2))
    return torch.stack(steps, dim=1).to(x_BTHP.dtype), state_BHNP if return_state else None


def _mlstm(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    resets_BT: Tensor | None,
    state_BHNP: Tensor | None,
    return_state: bool,
    backend: str = "auto",
) -> Result:
    heads, N = x_BTHP.shape[2], b_BTGN.shape[3]
    decay_BTH = (-dt_BTH * a_H).clamp_min(torch.finfo(dt_BTH.dtype).tiny)
    initial_state = None
    if state_BHNP is not None:
        initial_state = (state_BHNP, torch.zeros_like(state_BHNP[..., 0]), torch.zeros_like(state_BHNP[..., 0, 0]))
    result = mlstm(
        for_each_head(c_BTGN * N**0.5, heads),  # the mLSTM divides its queries by it
        for_each_head(b_BTGN, heads),
        x_BTHP,
        log_input(dt_BTH),
        -decay_BTH - torch.log(-torch.expm1(-decay_BTH)),  # sigmoid of this is e^-decay, also for tiny and huge ones
        resets=resets_BT,
        initial_state=initial_state,
        return_state=return_state,
        normalize=False,
        backend=backend,
    )
    if isinstance(result, Tensor):
        return result, None
    y_BTHP, (state_BHNP, _, m_BH) = result
    return y_BTHP, state_BHNP * m_BH.exp()[..., None, None]


@not_compiled("mamba_ssm")  # torch.compile cannot look into the package
def _mamba_ssm(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    resets_BT: Tensor | None,
    state_BHNP: Tensor | None,
    return_state: bool,
) -> Result:
    mamba_chunk_scan_combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    document_BT = None if resets_BT is None else resets_BT.cumsum(1).to(torch.int32)
    y_BTHP, state_BHPN = mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        a_H,
        b_BTGN,
        c_BTGN,
        chunk_size=256,
        seq_idx=document_BT,
        initial_states=None if state_BHNP is None else state_BHNP.transpose(2, 3).contiguous(),
        return_final_states=True,
    )
    return y_BTHP, state_BHPN.transpose(2, 3) if return_state else None


def log_input(dt_BTH: Tensor) -> Tensor:
    """Logarithm of the input gate of the mLSTM that computes SSD: it and its gradient are finite for a dt of 0 too."""
    return dt_BTH.clamp_min(torch.finfo(dt_BTH.dtype).tiny).log()


def for_each_head(x_BTGN: Tensor, num_heads: int) -> Tensor:
    """(B, T, G, N) -> (B, T, H, N), without a copy where there is one group."""
    B, T, G, N = x_BTGN.shape
    return x_BTGN[:, :, :, None].expand(B, T, G, num_heads // G, N).reshape(B, T, num_heads, N)


def ssd_inputs(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    B: int = 2,
    T: int = 300,
    H: int = 2,
    P: int = 64,
    G: int = 1,
    N: int = 128,
) -> list[Tensor]:
    """x, dt, a, b, c and a state for SSD, longer than mamba_ssm's chunks; dt, a and the state in float32."""
    x, b, c = (torch.randn(B, T, *sizes, device=device, dtype=dtype) for sizes in ((H, P), (G, N), (G, N)))
    dt, a, state = (torch.randn(shape, device=device) for shape in ((B, T, H), (H,), (B, H, N, P)))
    return [x, F.softplus(dt - 2), -a.exp(), b, c, state]


def samples(call: Call, backend: str) -> Iterator[Sample]:
    """A sequence from a state: on a GPU longer than a chunk of any kernel there."""
    steps = 300 if call.device.type == "cuda" else 100
    sizes = {letter: call.size(letter) for letter in "PN"}
    inputs = ssd_inputs(call.device, call.dtype, T=steps, G=call.size("G", 1), **sizes)
    resets_BT = some_resets(inputs)
    if steps > 256:
        resets_BT[0, 256] = True  # where a chunk of mamba_ssm begins
    resets_BT[1] = False  # the other row goes from state to state
    yield Sample(inputs, {"resets_BT": resets_BT}, "recurrence")


def run(backend: Backend, sample: Sample) -> Checked:
    """y and the last state as a function of x, dt, a, b, c and the first state."""

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *others, state_BHNP = inputs
        return backend.loaded(*others, sample.options["resets_BT"], state_BHNP, True)

    return function


def cost(*, B: int, T: int, H: int, P: int, N: int, G: int = 1, L: int = COUNTED_CHUNK, itemsize: int = 2) -> Cost:
    """Linear attention with K = N and V = P in chunks of L; x, dt, b, c read and y written once."""
    flops = linear_attention_flops(min(L, T), H, N, P)
    return Cost(B * T * flops, B * T * (itemsize * (2 * H * P + 2 * G * N) + 4 * H))


def kept(*, T: int, H: int, P: int, N: int, device: str, itemsize: int = 2, **sizes: int) -> float:
    """Bytes of the mLSTM with K = N and V = P, by whose kernels it runs, in chunks of their own choice."""
    del sizes
    return MLSTM.kept(T=T, H=H, K=N, V=P, device=device, itemsize=itemsize)


SSD = Operation(
    name="ssd",
    title="SSD",
    subject="x",
    backends=(
        Backend(
            name="mamba_ssm",
            function="xlstm_lm.ops.ssd:_mamba_ssm",
            devices=("cuda",),
            dtypes=tuple(TOLERANCE),
            package="mamba_ssm",
            exports=lambda call: False,
            checked_on=("cuda",),
        ),
        Backend(name="mlstm", function="xlstm_lm.ops.ssd:_mlstm"),
        Backend(
            name="chunkwise",
            function="xlstm_lm.ops.ssd:_mlstm",
            arguments={"backend": "chunkwise"},
            slow="as batched matrix products in PyTorch",
        ),
        Backend(name="recurrence", function="xlstm_lm.ops.ssd:_recurrence", slow="step by step in Python"),
    ),
    samples=samples,
    run=run,
    cost=cost,
    kept=kept,
    identity="NP",
    examples=({"P": 24, "N": 16, "G": 2},),
    gpu_examples=({"P": 64, "N": 128, "G": 1},),
)
