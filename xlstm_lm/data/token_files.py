"""Files of token ids in the indexed format of Megatron-LM: NAME.bin holds the ids, NAME.idx the begins of documents.

NAME.idx, little-endian: the 9 bytes MMIDIDX\\0\\0, version 1 (uint64), a code for the type of the ids (uint8), number
of sequences n (uint64), number of document bounds (uint64), n lengths in tokens (int32), n positions in NAME.bin in
bytes (int64), and the bounds of documents in sequences (int64). Here each sequence is a document.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_lm.base.durable_files import replace_durably

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
TYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""Types of ids by their codes in the format."""


def id_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of ids that holds a vocabulary."""
    return TYPES[8] if vocab_size <= 2**16 else TYPES[4]


def index_path(path: str | Path) -> Path:
    """Path of the index of a file of ids."""
    return Path(path).with_suffix(".idx")


def write_index(
    path: Path, lengths: Sequence[int] | np.ndarray, dtype: np.dtype[Any], left_out: np.ndarray | None = None
) -> None:
    """Write the index of a file of ids; once it is there, the file is complete.

    Args:
        path: The file of ids.
        lengths: Tokens of each document; 0 where a document was left out.
        dtype: Type of the ids.
        left_out: Whether each document is in the file of ids but not to be read, bool; None for no document.
    """
    sizes = np.asarray(lengths, dtype="<i4")
    kept = sizes if left_out is None else np.where(left_out, 0, sizes).astype("<i4")
    begins = np.zeros(len(sizes), dtype="<i8")
    np.cumsum(sizes[:-1], dtype="<i8", out=begins[1:])
    code = next(code for code, each in TYPES.items() if each == dtype)
    header = MAGIC + HEADER.pack(1, code, len(sizes), len(sizes) + 1)
    parts = kept, begins * dtype.itemsize, np.arange(len(sizes) + 1, dtype="<i8")
    replace_durably(index_path(path), b"".join((header, *(part.tobytes() for part in parts))))


class TokenFile:
    """A memory-mapped file of ids: any document is found at once."""

    def __init__(self, path: str | Path) -> None:
        """Open it.

        Raises:
            OSError: the file or its index is missing, cut short, or of another format.
        """
        index = index_path(path)
        try:
            content = np.memmap(index, dtype=np.uint8, mode="r")
        except ValueError:
            raise OSError(f"its index {index} is empty") from None
        begin = len(MAGIC) + HEADER.size
        if bytes(content[: len(MAGIC)]) != MAGIC or len(content) < begin:
            raise OSError(f"{index} is no index of Megatron's format")
        version, code, count, bounds = HEADER.unpack(bytes(content[len(MAGIC) : begin]))
        if version != 1 or code not in TYPES:
            raise OSError(f"{index} has version {version} and ids of type {code}; version 1, int32 and uint16 are read")
        if len(content) != begin + 12 * count + 8 * bounds:
            raise OSError(f"its index {index} is cut short")
        self.lengths = content[begin : begin + 4 * count].view("<i4")
        """Tokens of each document."""
        self._positions = content[begin + 4 * count : begin + 12 * count].view("<i8")
        self.dtype = dtype = TYPES[code]
        """Type of the ids in the file."""
        end = int(self._positions[-1]) + int(self.lengths[-1]) * dtype.itemsize if count else 0
        found = Path(path).stat().st_size
        if found < end or found % dtype.itemsize:
            raise OSError(f"it holds {found} bytes instead of {end}")
        total = found // dtype.itemsize
        self._ids = np.memmap(path, dtype=dtype, mode="r", shape=(total,)) if total else np.empty(0, dtype=dtype)

    def stored_lengths(self) -> np.ndarray:
        """Tokens of each document that are in the file of ids, those of documents that are left out included, int64."""
        return np.diff(self._positions, append=self._ids.nbytes) // self.dtype.itemsize

    def document(self, number: int, length: int | None = None) -> np.ndarray:
        """The ids of a document, int32; the first `length` that are in the file, None for those that are to be read."""
        begin = int(self._positions[number]) // self.dtype.itemsize
        return self._ids[begin : begin + (int(self.lengths[number]) if length is None else length)].astype(np.int32)
