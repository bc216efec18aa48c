"""The sLSTM's loops as persistent Triton kernels: a program computes a head and a tile of the batch for all steps.

R stays on chip. The products are transposed, with R as the first operand: the gates of a tile of rows are R^T (4D x D)
times y^T (D x tile), one product a step, which tensor cores support at 8 rows already. R is in shared memory, the state
in registers, and between steps only y goes through shared memory. Step t fetches the inputs of step t + 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_lm.ops.assembler import check_machine_code
from xlstm_lm.ops.gpu import ARCHITECTURES, KIB, architecture, padded, processors, why_no_launches
from xlstm_lm.ops.slstm.fused import CHECKPOINT_STEPS
from xlstm_lm.ops.slstm.recurrence import SLSTMState
from xlstm_lm.ops.slstm.shares import from_shares, into_shares
from xlstm_lm.ops.slstm.triton_pointwise import advance, rebuild, retreat

LARGEST = {torch.float32: 32, torch.bfloat16: 128, torch.float16: 128}
"""Units of the largest heads, by type: R has to fit into shared memory, and in float32 is there in two parts. AMD's
processors have less of it, for half as many."""
BEYOND_64 = 160 * KIB
"""Shared memory, in bytes, that heads of more than 64 units need; in 16-bit types those of 64 need 64 KiB."""
TILES = (8, 16)
"""Rows of the batch in a program; the fewest that leave no program waiting for a processor."""


class Launch(NamedTuple):
    """Launch parameters of the loops."""

    tile: int
    warps: int
    stages: int
    """Steps that the backward reads ahead, and one. Their inputs are in shared memory meanwhile."""
    precision: str
    """Precision of float32 products: three on tensor cores, nearly as exact, where these support it."""


def largest(dtype: torch.dtype, device: torch.device) -> int:
    """Units of the largest heads that these kernels accept; 0 for types that they do not accept."""
    name, most = architecture(device), LARGEST.get(dtype, 0)
    if name.startswith("gfx"):
        return most // 2
    return most if ARCHITECTURES[name].shared_bytes >= BEYOND_64 else min(most, 64)


def why_not(device: torch.device, D: int, dtype: torch.dtype) -> str | None:
    """The reason why these kernels do not accept heads of D units on a device; None if they do."""
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton's kernels run on a GPU, not on {device}"
    if dtype not in LARGEST:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    problem = why_no_launches(device)
    if problem is not None:
        return f"it {problem}"
    limit, name = largest(dtype, device), architecture(device)
    if limit >= D:
        return None
    shared = ARCHITECTURES[name].shared_bytes
    return (
        f"it takes heads of up to {limit} units in {dtype} where a block has {shared} bytes of shared memory ({name})"
    )


def rows(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of the batch that a program computes."""
    return launch_for(B, H, D, dtype, device).tile


def launch_for(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch parameters on a device."""
    target = ARCHITECTURES[architecture(device)].launches
    amd = target.startswith("gfx")
    tiles = TILES[1:] if amd else TILES  # its matrix instructions take 16 columns
    tile = next((tile for tile in tiles if H * -(-B // tile) <= processors(device)), tiles[-1])
    room = padded(D) * tile * (2 if target == "sm_80" else 1)  # of one step, relative to what there is
    stages = 3 if room <= 1024 else 2 if room <= 2048 else 1
    large = not amd and padded(D) * tile * dtype.itemsize > 1024
    spills = large and (target == "sm_100" or dtype == torch.float32 or D % 8 != 0)  # with four warps
    return Launch(tile, 8 if D > 64 or spills else 4, stages, "ieee" if amd else "tf32x3")


@triton.jit
def _split(x, D: tl.constexpr, TILE: tl.constexpr):
    """A (4D, tile) tensor as its four parts; they stay where they are in registers."""
    x = tl.permute(tl.reshape(x, [2, 2, D, TILE]), [2, 3, 0, 1])
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _join(first, second, third, fourth, D: tl.constexpr, TILE: tl.constexpr):
    """The inverse of `_split`."""
    x = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.permute(x, [2, 3, 0, 1]), [4 * D, TILE])


@triton.jit
def _at(ptr, stride, t):
    """The address where step t begins."""
    return ptr + tl.cast(t, tl.int64) * stride


@triton.jit(do_not_specialize=["B", "T"])
def forward_loop_kernel(
    wx_ptr,
    r_ptr,
    bias_ptr,
    resets_ptr,
    state_ptr,
    y_ptr,
    checkpoints_ptr,
    last_ptr,
    wx_strides,
    B,
    T,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State and last are (4, B, H, D): y, c, n, m."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    gate_unit = tl.arange(0, 4 * BLOCK_D)
    gate, unit = gate_unit // BLOCK_D, gate_unit % BLOCK_D
    there = (d < D)[:, None] & (row < B)[None, :]
    there_of_gates = (unit < D)[:, None] & (row < B)[None, :]

    r_places = head * D * D + gate[:, None] * (H * D * D) + d[None, :] * D + unit[:, None]
    r = tl.load(r_ptr + r_places, (unit < D)[:, None] & (d < D)[None, :], 0.0)
    bias = tl.load(bias_ptr + gate * (H * D) + head * D + unit, unit < D, 0.0)
    wx_ptr += head * wx_strides[3]
    wx_places = row[None, :] * wx_strides[0] + gate[:, None] * wx_strides[2] + unit[:, None]
    y_places = (row * T * H + head)[None, :] * D + d[:, None]
    state_places = (row * H + head)[None, :] * D + d[:, None]
    size = B.to(tl.int64) * H * D

    y = tl.load(state_ptr + state_places, there, 0.0).to(r_ptr.dtype.element_ty)
    c = tl.load(state_ptr + size + state_places, there, 0.0)
    n = tl.load(state_ptr + 2 * size + state_places, there, 1.0)
    m = tl.load(state_ptr + 3 * size + state_places, there, 0.0)
    if HAS_RESETS:
        resets_ptr += row * T
        reset = tl.load(resets_ptr, row < B, 0)
    for first in range(0, T, EVERY):
        tl.store(checkpoints_ptr + state_places, c, there)
        tl.store(checkpoints_ptr + size + state_places, n, there)
        tl.store(checkpoints_ptr + 2 * size + state_places, m, there)
        checkpoints_ptr += 3 * size
        for t in tl.range(first, tl.minimum(first + EVERY, T), num_stages=STAGES):
            if HAS_RESETS:
                emptied = (reset != 0)[None, :]
                reset = tl.load(resets_ptr + tl.minimum(t + 1, T - 1), row < B, 0)
                y = tl.where(emptied, 0.0, y).to(y.dtype)
                c = tl.where(emptied, 0.0, c)
                n = tl.where(emptied, 0.0, n)
                m = tl.where(emptied, float("-inf"), m)
            wx = tl.load(_at(wx_ptr, wx_strides[1], t) + wx_places, there_of_gates, 0.0)
            gates = tl.dot(r, y, wx.to(tl.float32) + bias[:, None], input_precision=PRECISION)
            i, f, z, o = _split(gates, BLOCK_D, TILE)
            c, n, m, _, _, _ = advance(i, f, z, c, n, m)
            y = (c / (n * (1.0 + tl.exp(-o)))).to(y.dtype)
            tl.store(_at(y_ptr, H * D, t) + y_places, y, there)
    tl.store(last_ptr + state_places, y.to(tl.float32), there)
    tl.store(last_ptr + size + state_places, c, there)
    tl.store(last_ptr + 2 * size + state_places, n, there)
    tl.store(last_ptr + 3 * size + state_places, m, there)


@triton.jit(do_not_specialize=["B", "T"])
def backward_loop_kernel(
    values_ptr,
    r_ptr,
    dlast_ptr,
    dgates_ptr,
    dfirst_ptr,
    B,
    T,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dlast is (3, B, H, D): gradients of y, h, s after the last step; dfirst those of y before the first step and of h
    and s after it. In memory, values are H, B, T, 6, D and dgates H, B, T, 4, D."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    gate_unit = tl.arange(0, 4 * BLOCK_D)
    gate, unit = gate_unit // BLOCK_D, gate_unit % BLOCK_D
    there = (d < D)[:, None] & (row < B)[None, :]
    there_of_gates = (unit < D)[:, None] & (row < B)[None, :]

    r_places = head * D * D + gate[None, :] * (H * D * D) + d[:, None] * D + unit[None, :]
    r = tl.load(r_ptr + r_places, (d < D)[:, None] & (unit < D)[None, :], 0.0)
    line = ((head * B + row) * T)[None, :]
    four_places = line * (6 * D) + gate[:, None] * D + unit[:, None]
    two_unit = tl.arange(0, 2 * BLOCK_D)
    two_places = line * (6 * D) + (4 + two_unit // BLOCK_D)[:, None] * D + (two_unit % BLOCK_D)[:, None]
    there_of_two = (two_unit % BLOCK_D < D)[:, None] & (row < B)[None, :]
    dgates_places = line * (4 * D) + gate[:, None] * D + unit[:, None]
    state_places = (row * H + head)[None, :] * D + d[:, None]
    size = B.to(tl.int64) * H * D

    carried_dy = tl.load(dlast_ptr + state_places, there, 0.0)
    dh = tl.load(dlast_ptr + size + state_places, there, 0.0)
    ds = tl.load(dlast_ptr + 2 * size + state_places, there, 0.0)
    for step in tl.range(T, num_stages=STAGES):
        t = T - 1 - step
        four = tl.load(_at(values_ptr, 6 * D, t) + four_places, there_of_gates, 0.0)
        two = tl.load(_at(values_ptr, 6 * D, t) + two_places, there_of_two, 0.0)
        output, share, squashed, h = _split(four, BLOCK_D, TILE)
        closed, dy = tl.split(tl.permute(tl.reshape(two, [2, BLOCK_D, TILE]), [1, 2, 0]))
        if t == 0:
            tl.store(dfirst_ptr + 2 * size + state_places, ds, there)
        di, df, dz, do, dh_after, dh, ds = retreat(carried_dy + dy, dh, ds, output, share, squashed, h, closed)
        if t == 0:
            tl.store(dfirst_ptr + size + state_places, dh_after, there)
        dgates = _join(di, df, dz, do, BLOCK_D, TILE).to(r.dtype)
        tl.store(_at(dgates_ptr, 4 * D, t) + dgates_places, dgates, there_of_gates)
        carried_dy = tl.dot(r, dgates, input_precision=PRECISION)
        carried_dy = tl.where(closed < 0.0, 0.0, carried_dy)  # the step was a reset
    tl.store(dfirst_ptr + state_places, carried_dy, there)


def forward_loop(
    wx_BTGHD: Tensor, r_GHDE: Tensor, bias_GHD: Tensor, resets_BT: Tensor | None, state: SLSTMState
) -> tuple[Tensor, Tensor, SLSTMState]:
    """See `fused.Loops`."""
    B, T, _, H, D = wx_BTGHD.shape
    launch = launch_for(B, H, D, wx_BTGHD.dtype, wx_BTGHD.device)
    y_BTHD = wx_BTGHD.new_empty(B, T, H, D)
    checkpoints_NSBHD = bias_GHD.new_empty(-(-T // CHECKPOINT_STEPS), 3, B, H, D)
    last_SBHD = bias_GHD.new_empty(4, B, H, D)
    forward_loop_kernel[(H, triton.cdiv(B, launch.tile))](
        wx_BTGHD,
        r_GHDE,
        bias_GHD,
        y_BTHD if resets_BT is None else resets_BT,
        torch.stack(state),
        y_BTHD,
        checkpoints_NSBHD,
        last_SBHD,
        wx_BTGHD.stride(),
        B,
        T,
        H,
        D,
        BLOCK_D=padded(D),
        TILE=launch.tile,
        HAS_RESETS=resets_BT is not None,
        EVERY=CHECKPOINT_STEPS,
        PRECISION=launch.precision,
        STAGES=3,
        num_warps=launch.warps,
    )
    check_machine_code((forward_loop_kernel,), y_BTHD.device)
    return y_BTHD, checkpoints_NSBHD, tuple(part.clone() for part in last_SBHD)


def backward_loop(
    gates_BTGHD: Tensor,
    r_GHDE: Tensor,
    dy_BTHD: Tensor,
    checkpoints_NSBHD: Tensor,
    resets_BT: Tensor | None,
    dlast: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See `fused.Loops`."""
    B, T, _, H, D = gates_BTGHD.shape
    launch = launch_for(B, H, D, dy_BTHD.dtype, dy_BTHD.device)
    kept = rebuild(gates_BTGHD, dy_BTHD, checkpoints_NSBHD, resets_BT)
    dgates_BTGHD = torch.empty_like(gates_BTGHD, dtype=dy_BTHD.dtype)
    dfirst_SBHD = gates_BTGHD.new_empty(3, B, H, D)
    backward_loop_kernel[(H, triton.cdiv(B, launch.tile))](
        kept.values_BTVHD,
        r_GHDE,
        torch.stack(into_shares(dlast, kept)),
        dgates_BTGHD,
        dfirst_SBHD,
        B,
        T,
        H,
        D,
        BLOCK_D=padded(D),
        TILE=launch.tile,
        PRECISION=launch.precision,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    check_machine_code((backward_loop_kernel,), dy_BTHD.device)
    dy_BHD, dh_BHD, ds_BHD = dfirst_SBHD
    return dgates_BTGHD, from_shares(dy_BHD, dh_BHD, ds_BHD, kept)
