"""Launch parameters of the mLSTM's Triton kernels: chunk length, block sizes, warps, stages; and cuts of a sequence."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

from xlstm_lm.base.tracing import constant_result
from xlstm_lm.ops.assembler import why_not_chained
from xlstm_lm.ops.gpu import ARCHITECTURES, KIB, architecture, padded, processors, why_no_launches

PROGRAMS = 2
"""Programs of a walk for each processor to aim at."""
SHORTEST = 16
"""Chunks in a super-chunk, at least, where there are as many: each super-chunk costs a state written and read."""


class Launch(NamedTuple):
    """Launch parameters of one kernel."""

    block_k: int
    """Rows of the state that a program has; in the walks, of each of the parts that make up all of them."""
    block_v: int
    """Columns of the state that a program has."""
    warps: int
    stages: int


class Launches(NamedTuple):
    """Launch parameters of all kernels, for one K, V, type and processor."""

    L: int
    """Steps a chunk."""
    precision: str
    """Precision of float32 products: "ieee", which is float32 throughout. ("tf32x3", three products on tensor cores,
    would be faster and nearly as exact, but the state and its parts do not fit in registers.) Not used for 16-bit
    types."""
    states: Launch
    forward: Launch
    dq: Launch
    dk: Launch
    dv: Launch


class Plan(NamedTuple):
    """The cuts of a sequence: chunks of L steps, and super-chunks of `chunks` chunks that run in parallel."""

    L: int
    chunks: int
    precision: str

    @property
    def steps(self) -> int:
        """Steps a super-chunk."""
        return self.L * self.chunks

    def supers(self, T: int) -> int:
        """Super-chunks in T steps, the last one of any length."""
        return -(-T // self.steps)


TUNED: dict[str, Launch] = {}
"""Launches that `triton_autotune` found, or read, or that another rank of the run found, in place of the table's."""
TABLE = {
    # (16-bit?, architecture): L, entries of a part, columns and numbers of a state at most, warps at least and at most,
    # stages, edge of a contribution
    (True, "sm_80"): (32, 64, 64, 8192, 4, 4, 2, 128),
    (True, "sm_90"): (32, 64, 128, 32768, 4, 8, 2, 128),
    (True, "sm_100"): (32, 64, 128, 32768, 8, 8, 2, 128),
    (True, "gfx942"): (32, 64, 64, 16384, 4, 4, 1, 64),
    (False, "sm_80"): (16, 32, 64, 4096, 8, 8, 1, 64),
    (False, "sm_90"): (16, 64, 64, 4096, 8, 8, 1, 64),
    (False, "sm_100"): (16, 64, 64, 4096, 8, 8, 1, 64),
    (False, "gfx942"): (16, 32, 64, 4096, 8, 8, 1, 64),
    # K or V of more than WIDE on any NVIDIA architecture.
    (True, "wide"): (32, 64, 16, 8192, 8, 8, 2, 128),
    (False, "wide"): (16, 32, 64, 4096, 8, 8, 1, 64),
}
"""Chosen such that everything fits and nothing spills on sm_90 and sm_100, as `eval.kernels --compile-report` shows.
Their speed has not been measured."""
WIDE = 512
"""The largest padded K or V for the warp-group products of sm_90 and sm_100. A larger state leaves 16 columns to a
program, too few for such products: with those architectures' parameters the walks spill 11 to 15 KB a thread."""
NARROW = 64 * 64
"""The entries of a state, padded, up to which the walks have all warps on sm_90: heads of 28 x 56 spill with four."""
ALIGNED = 16
"""K and V are multiples of this number where rows of heads begin at addresses that allow the widest loads."""
BEYOND_512 = 160 * KIB
"""Shared memory, in bytes, for a larger K or V on NVIDIA: the walks hold 128 bytes a unit, and 7 KiB. On AMD, where
they prefetch nothing, 8 KiB are enough for any."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def launches(K: int, V: int, dtype: torch.dtype, architecture: str) -> Launches:
    """The launch parameters for such heads on an architecture of `gpu.ARCHITECTURES`."""
    row = ARCHITECTURES[architecture].launches
    if row != "gfx942" and padded(max(K, V)) > WIDE:
        row = "wide"
    L, part, most, numbers, least_warps, most_warps, stages, edge = TABLE[dtype != torch.float32, row]

    if row == "sm_90" and padded(K) * padded(V) <= NARROW:
        least_warps = most_warps
    if row == "sm_100" and (K % ALIGNED or V % ALIGNED):
        most, stages = min(most, 64), 1  # without wide loads, what is prefetched stays in registers, and spills
    edge_k = 64 if row == "sm_100" and K % edge else edge  # the masks of a ragged block of 128 rows spill

    def walk(rows: int, width: int) -> Launch:
        rows = padded(rows)
        columns = min(padded(width), most, max(16, numbers // rows))
        if row == "sm_90" and width % columns and columns > most // 2:
            columns //= 2  # the masks of a ragged width and as many columns spill
        warps = max(columns // 16, 8 * rows * columns // numbers)
        return Launch(min(rows, part), columns, min(max(warps, least_warps), most_warps), stages)

    return Launches(
        L=L,
        precision="ieee" if dtype == torch.float32 else "tf32",
        states=Launch(min(padded(K), edge_k), min(padded(V), edge), 8, stages),
        forward=walk(K, V),
        dq=walk(V, K),
        dk=walk(V, K),
        dv=walk(K, V),
    )


def widest(architecture: str) -> int:
    """The largest K or V for which the walks fit an architecture of `gpu.ARCHITECTURES`."""
    has_room = architecture.startswith("gfx") or ARCHITECTURES[architecture].shared_bytes >= BEYOND_512
    return 1024 if has_room else WIDE


@constant_result
@functools.cache
def why_not_step(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why the Triton kernels run for no heads in `dtype` on a device; None if they do.

    It continues a sentence about the backend, as does that of `why_not`.
    """
    if dtype not in TYPES:
        return f"takes float32, bfloat16 or float16, got {dtype}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"takes tensors of a GPU, got {device}"
    return why_no_launches(device)


@constant_result
@functools.cache
def why_not(K: int, V: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why the Triton kernels do not train heads of K x V in `dtype` on a device; None if they do."""
    problem = why_not_step(dtype, device) or why_not_chained(device)
    if problem is not None:
        return problem
    name = architecture(device)
    shared, limit = ARCHITECTURES[name].shared_bytes, widest(name)
    if max(K, V) <= limit:
        return None
    return f"takes K and V of up to {limit} where a block has {shared} bytes of shared memory ({name}), got {K} and {V}"


def make_plan(
    chosen: Launches, B: int, T: int, H: int, K: int, V: int, device: torch.device, shortest: int = SHORTEST
) -> Plan:
    """Super-chunks that are as many as keep all processors busy, but of `shortest` chunks at least."""
    chunks = -(-T // chosen.L)
    blocks = min(-(-V // chosen.forward.block_v), -(-K // chosen.dq.block_v))
    wanted = max(1, PROGRAMS * processors(device) // (B * H * blocks))
    longest = -(-chunks // wanted)
    return Plan(chosen.L, min(chunks, max(longest, shortest)), chosen.precision)
