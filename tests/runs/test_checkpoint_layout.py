"""Pieces of tensors join to the whole, however many ranks wrote them and however many read."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.runs.checkpoint_layout import (
    FILE,
    HostBuffers,
    Piece,
    Share,
    StoredTensor,
    equal_shares,
    stored_tensors,
    write_shares,
)

Tensors = dict[str, torch.Tensor]


def of_equal_parts(tensors: Tensors, rank: int, ranks: int) -> list[Share]:
    """Stage 0: an equal part of everything."""
    total = sum(tensor.numel() for tensor in tensors.values())
    return list(equal_shares(tensors.items(), total, rank, ranks))


def of_flat_partitions(tensors: Tensors, rank: int, ranks: int) -> list[Share]:
    """Stages 1 and 2: a partition, padded at the end, of all tensors laid end to end."""
    size = -(-sum(tensor.numel() for tensor in tensors.values()) // ranks)
    shares, before = [], 0
    for name, tensor in tensors.items():
        start, stop = max(size * rank - before, 0), min(size * (rank + 1) - before, tensor.numel())
        if start < stop:
            shares.append(Share(name, start, tensor.flatten()[start:stop]))
        before += tensor.numel()
    return shares


def of_each_tensor(tensors: Tensors, rank: int, ranks: int) -> list[Share]:
    """Stage 3: a share of each tensor, padded at the end."""
    shares = []
    for name, tensor in tensors.items():
        size = -(-tensor.numel() // ranks)
        values_N = tensor.flatten()[size * rank : size * (rank + 1)]
        if values_N.numel():
            shares.append(Share(name, size * rank, values_N))
    return shares


DIVISIONS = [of_equal_parts, of_flat_partitions, of_each_tensor]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=5),
    before=st.tuples(st.sampled_from(DIVISIONS), st.integers(1, 9)),
    after=st.tuples(st.sampled_from(DIVISIONS), st.integers(1, 9)),
)
def test_tensors_pass_from_any_division_to_any_other(shapes, before, after, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("files")
    tensors = {f"tensor{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    divide, ranks = before
    pieces, buffers = [], HostBuffers()
    for rank in range(ranks):
        shares = buffers.copy("model", divide(tensors, rank, ranks))
        name = FILE.format("model", rank)
        written = write_shares(folder / name, shares)
        assert written["size"] == (folder / name).stat().st_size
        pieces.append({share.name: Piece(name, share.start, share.values_N.numel()) for share in shares})
    stored = stored_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, pieces)
    stored = {name: StoredTensor.from_json(tensor.as_json()) for name, tensor in stored.items()}
    files = {
        name: safetensors.torch.load_file(folder / name) for name in {p.file for s in stored.values() for p in s.pieces}
    }

    divide, ranks = after
    counts = {name: torch.zeros(tensor.numel()) for name, tensor in tensors.items()}
    for rank in range(ranks):
        for share in divide(tensors, rank, ranks):
            stop = share.start + share.values_N.numel()
            parts = [files[piece.file][share.name][a:b] for piece, a, b in stored[share.name].parts(share.start, stop)]
            assert torch.equal(torch.cat(parts), share.values_N)
            counts[share.name][share.start : stop] += 1
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([("a", 0, 3)], "hold 3 elements instead of 6"),
        ([("a", 0, 3), ("b", 2, 4)], "do not join at element 3"),
        ([("a", 0, 3), ("b", 4, 2)], "do not join at element 3"),
        ([("a", 0, 7)], "hold 7 elements instead of 6"),
    ],
)
def test_pieces_that_do_not_hold_each_element_once_are_refused(pieces, problem):
    with pytest.raises(ValueError, match=problem):
        StoredTensor((2, 3), tuple(Piece(*piece) for piece in pieces))
