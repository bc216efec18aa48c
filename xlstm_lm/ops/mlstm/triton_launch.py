"""How the mLSTM's Triton kernels are launched: chunk length, block sizes, warps, stages; and how a sequence is cut."""

from __future__ import annotations

from typing import NamedTuple

import torch

from xlstm_lm.ops.gpu import padded, processors

PROGRAMS = 2
"""Programs of a walk for each processor to aim at."""
SHORTEST = 16
"""Chunks in a super-chunk, at least, where there are as many: each super-chunk costs a state written and read."""


class Launch(NamedTuple):
    """How one kernel is launched."""

    block_k: int
    """Rows of the state that a program has; in the walks, of each of the parts that make up all of them."""
    block_v: int
    """Columns of the state that a program has."""
    warps: int
    stages: int


class Launches(NamedTuple):
    """How all of them are, for one K, V, type and processor."""

    L: int
    """Steps a chunk."""
    precision: str
    """Of float32 products: "ieee", which is float32 throughout. ("tf32x3", three products on tensor cores, would be
    faster and nearly as exact, but the state and what it is split into do not fit in registers.) Without meaning for
    16-bit types."""
    states: Launch
    forward: Launch
    dq: Launch
    dk: Launch
    dv: Launch


class Plan(NamedTuple):
    """How a sequence is cut: into chunks of L steps, and super-chunks of `chunks` chunks that run in parallel."""

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
}
"""Chosen so that everything fits and nothing spills on sm_90 and sm_100, as `eval.kernels --compile-report` shows.
Their speed has not been measured."""


def launches(K: int, V: int, dtype: torch.dtype, architecture: str) -> Launches:
    """The launch parameters for such heads on an architecture of `TABLE`."""
    L, part, most, numbers, least_warps, most_warps, stages, edge = TABLE[dtype != torch.float32, architecture]

    def walk(rows: int, width: int) -> Launch:
        rows = padded(rows)
        columns = min(padded(width), most, max(16, numbers // rows))
        warps = max(columns // 16, 8 * rows * columns // numbers)
        return Launch(min(rows, part), columns, min(max(warps, least_warps), most_warps), stages)

    return Launches(
        L=L,
        precision="ieee" if dtype == torch.float32 else "tf32",
        states=Launch(min(padded(K), edge), min(padded(V), edge), 8, stages),
        forward=walk(K, V),
        dq=walk(V, K),
        dk=walk(V, K),
        dv=walk(K, V),
    )


def make_plan(
    chosen: Launches, B: int, T: int, H: int, K: int, V: int, device: torch.device, shortest: int = SHORTEST
) -> Plan:
    """Super-chunks that are as many as keep all processors busy, but of `shortest` chunks at least."""
    chunks = -(-T // chosen.L)
    blocks = min(-(-V // chosen.forward.block_v), -(-K // chosen.dq.block_v))
    wanted = max(1, PROGRAMS * processors(device) // (B * H * blocks))
    longest = -(-chunks // wanted)
    return Plan(chosen.L, min(chunks, max(longest, shortest)), chosen.precision)
