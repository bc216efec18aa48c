"""Pieces of Triton kernels on a chunk of one head: its tile of a tensor, the weights of its steps; and how to scan."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_weights(c_ptr, x_ptr, x_query_ptr, m_ptr, segment_ptr, first, T, L: tl.constexpr, HAS_RESETS: tl.constexpr):
    """The chunk from step `first`: weight of the state before at each step (by the x of its query), weight of each step
    in the state after, and what is left in that of the state before. See `triton_gates` for c, x and m."""
    t = first + tl.arange(0, L)
    inside = t < T
    last = tl.minimum(first + L, T)
    x_last = tl.load(x_ptr + last - 1)
    m_before = tl.load(m_ptr + first)
    query = tl.exp2(m_before - tl.load(x_query_ptr + t, inside, float("inf")))
    key = tl.exp2(tl.load(c_ptr + t, inside, float("-inf")) - x_last)
    kept = tl.exp2(m_before - x_last)
    if HAS_RESETS:
        segment = tl.load(segment_ptr + t + 1, inside, -1)
        segment_before = tl.load(segment_ptr + first)
        segment_last = tl.load(segment_ptr + last)
        query = tl.where(segment == segment_before, query, 0.0)
        key = tl.where(segment == segment_last, key, 0.0)
        kept = tl.where(segment_before == segment_last, kept, 0.0)
    return query, key, kept


@triton.jit
def weights_between(c_ptr, x_query_ptr, segment_ptr, first, T, L: tl.constexpr, HAS_RESETS: tl.constexpr):
    """Weight (reader, source) of each step of the chunk from `first` at each other, 0 where there is none."""
    step = tl.arange(0, L)
    t = first + step
    c = tl.load(c_ptr + t, t < T, float("-inf"))
    x_query = tl.load(x_query_ptr + t, t < T, float("inf"))
    seen = step[:, None] >= step[None, :]
    if HAS_RESETS:
        segment = tl.load(segment_ptr + t + 1, t < T, -1)
        seen = seen & (segment[:, None] == segment[None, :])
    return tl.where(seen, tl.exp2(c[None, :] - x_query[:, None]), 0.0)


@triton.jit
def join_stretches(kept_1, sum_1, kept_2, sum_2):
    """Two stretches as one: the factor of a state, or a sum, before them, and the sum that they add."""
    return kept_1 * kept_2, sum_1 * kept_2 + sum_2


@triton.jit
def _tile(ptr, strides, first, start, T, SIZE: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of one head's steps from `first` and entries from `start`, and the mask of those that exist."""
    step, entry = tl.arange(0, L), tl.arange(0, BLOCK)
    ptr += first.to(tl.int64) * strides[1] + start * strides[3]
    inside = (step < T - first)[:, None]
    if SIZE % BLOCK != 0:
        inside = inside & (entry < SIZE - start)[None, :]
    return ptr + step[:, None] * strides[1] + entry[None, :] * strides[3], inside


@triton.jit
def load_tile(ptr, strides, first, start, T, SIZE: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """(L, BLOCK) of one head of a (B, T, H, SIZE) tensor with such strides, 0 outside it."""
    where, inside = _tile(ptr, strides, first, start, T, SIZE, L, BLOCK)
    return tl.load(where, inside, 0.0)


@triton.jit
def store_tile(ptr, strides, first, start, T, x, SIZE: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_tile`."""
    where, inside = _tile(ptr, strides, first, start, T, SIZE, L, BLOCK)
    tl.store(where, x.to(ptr.dtype.element_ty), inside)
