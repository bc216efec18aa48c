"""How the mLSTM's Triton kernels are launched: chunk length, block sizes, warps, stages; and how a sequence is cut."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How one kernel is launched."""

    block_k: int
    """Rows of the state that a program has (all of them in the walks)."""
    block_v: int
    """Columns of the state that a program has."""
    warps: int
    stages: int


class Launches(NamedTuple):
    """How all of them are, for one K, V, type and processor."""

    L: int
    """Steps a chunk."""
    precision: str
    """Of float32 products: "ieee", or "tf32x3" (three tensor core products, as exact as float32 to a few bits)."""
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


def launches(K: int, V: int, dtype: torch.dtype, architecture: str) -> Launches:
    wide_k, wide_v = padded(K), padded(V)

    def walk(rows, columns):
        return Launch(rows, min(columns, 64), 8 if rows >= 128 else 4, 1)

    return Launches(
        64 if dtype != torch.float32 else 32,
        "ieee",
        Launch(min(wide_k, 128), min(wide_v, 128), 4, 2),
        walk(wide_k, wide_v),
        walk(wide_v, wide_k),
        walk(wide_v, wide_k),
        walk(wide_k, wide_v),
    )


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile has for `width`."""
    return max(16, 1 << (width - 1).bit_length())


def architecture(device: torch.device) -> str:
    return "sm_90"


def make_plan(chosen: Launches, B: int, T: int, H: int, device: torch.device) -> Plan:
    return Plan(chosen.L, -(-T // chosen.L), chosen.precision)
