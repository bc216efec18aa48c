"""Pieces of tensors in the files of a checkpoint: each rank writes its own, and any other division reads them."""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CARRIED = "carried"
STEMS = ("model", "optimizer", CARRIED)
"""Float32 weights, by parameter name; optimizer state, by NAME.KEY; states of all lanes, by block_NUMBER.POSITION."""
FILE = "{}_rank{:04}.safetensors"
BLOCK = 1 << 24
"""Bytes that are written, and checksummed, at a time."""


@dataclass(frozen=True)
class Share:
    """Part of one flattened tensor that a rank holds, or that it writes."""

    name: str
    start: int
    """First element, in the flattened tensor."""
    values_N: Tensor
    """The elements, (N,)."""


@dataclass(frozen=True)
class Piece:
    """Part of one flattened tensor in a file, which holds it under the tensor's name."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """Shape of a tensor and the pieces that hold it, in order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        end = 0
        for piece in self.pieces:
            if piece.start != end or piece.length < 1:
                raise ValueError(f"its pieces do not join at element {end}")
            end += piece.length
        if end != math.prod(self.shape):
            raise ValueError(f"its pieces hold {end} elements instead of {math.prod(self.shape)}")

    def parts(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """Yield each piece that overlaps elements start to stop, and the overlap's start and stop in the piece."""
        for piece in self.pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.length)
            if first < last:
                yield piece, first - piece.start, last - piece.start

    def as_json(self) -> dict[str, Any]:
        """Entry of the manifest: the shape, and file, offset and length of each piece."""
        return {
            "shape": list(self.shape),
            "pieces": [[piece.file, piece.start, piece.length] for piece in self.pieces],
        }

    @classmethod
    def from_json(cls, entry: Any) -> StoredTensor:
        """Read an entry of the manifest.

        Raises:
            ValueError: the entry is none, or its pieces do not hold each element once.
        """
        try:
            pieces = [Piece(str(file), int(start), int(length)) for file, start, length in entry["pieces"]]
            return cls(tuple(map(int, entry["shape"])), tuple(pieces))
        except (TypeError, KeyError) as error:
            raise ValueError(f"it has no shape and pieces ({error!r})") from error


def equal_shares(tensors: Iterable[tuple[str, Tensor]], total: int, rank: int, ranks: int) -> Iterator[Share]:
    """Yield this rank's equal part of tensors that all ranks hold, laid end to end.

    Args:
        tensors: Name and value of each tensor.
        total: Number of their elements together.
        rank: This rank.
        ranks: Number of ranks.
    """
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    before = 0
    for name, tensor in tensors:
        start, stop = max(first - before, 0), min(last - before, tensor.numel())
        if start < stop:
            yield Share(name, start, tensor.detach().reshape(-1)[start:stop])
        before += tensor.numel()


def stored_tensors(
    shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[Mapping[str, Piece]]
) -> dict[str, StoredTensor]:
    """Join the pieces of all ranks to whole tensors.

    Args:
        shapes: Shape of each tensor.
        pieces: Pieces of each rank, by the tensor's name.

    Raises:
        ValueError: the pieces of a tensor do not hold each of its elements once; names it.
    """
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    for of_rank in pieces:
        for name, piece in of_rank.items():
            found[name].append(piece)
    stored = {}
    for name, its_pieces in found.items():
        try:
            stored[name] = StoredTensor(tuple(shapes[name]), tuple(sorted(its_pieces, key=lambda piece: piece.start)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return stored


def write_shares(path: Path, shares: list[Share]) -> dict[str, int]:
    """Write shares, float32 on the host, to a safetensors file through to the disk. Returns its size and CRC-32.

    The file is written from the tensors' own memory in blocks: safetensors' writer copies all of it at first.
    """
    ends = [0]
    for share in shares:
        ends.append(ends[-1] + 4 * share.values_N.numel())
    entries = {
        share.name: {"dtype": "F32", "shape": [share.values_N.numel()], "data_offsets": [start, end]}
        for share, (start, end) in zip(shares, itertools.pairwise(ends), strict=True)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    checksum = 0
    with path.open("wb") as file:
        contents: list[Any] = [share.values_N.numpy().view(np.uint8) for share in shares]
        for content in (len(header).to_bytes(8, "little"), header, *contents):
            for first in range(0, len(content), BLOCK):
                block = memoryview(content)[first : first + BLOCK]
                file.write(block)
                checksum = zlib.crc32(block, checksum)
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(header) + ends[-1], "crc32": checksum}


class HostBuffers:
    """Copies of shares in host memory, pinned for copies from a GPU and kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, stem: str, shares: Iterable[Share]) -> list[Share]:
        """Copy shares to the host, all into one buffer for the stem. Valid until the next call for that stem."""
        own = list(shares)
        size = sum(share.values_N.numel() for share in own)
        on_gpu = any(share.values_N.is_cuda for share in own)
        buffer = self._buffers.get(stem)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[stem] = torch.empty(size, dtype=torch.float32, pin_memory=on_gpu)
        copied, end = [], 0
        for share in own:
            target = buffer[end : end + share.values_N.numel()]
            target.copy_(share.values_N.detach(), non_blocking=on_gpu)
            copied.append(Share(share.name, share.start, target))
            end += share.values_N.numel()
        if on_gpu:
            torch.cuda.synchronize()
        return copied
