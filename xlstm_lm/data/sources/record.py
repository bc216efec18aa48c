"""Interface of all sources: documents as records, and positions among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from xlstm_lm.base.announce import announce_once
from xlstm_lm.data.sources.config import SourceConfig

ORDER = 2
"""Version of the order of documents, kept in checkpoints: a run goes on in the order it began with. In order 1, lanes
that share a file take turns by its lines, a byte order mark is text, and a file with two names is read twice."""


class Piece(NamedTuple):
    """The share of a shard that one lane reads: the whole (1 part), or one of several parts."""

    shard: int
    part: int = 0
    parts: int = 1


class Landmark(NamedTuple):
    """A place in a file of lines at which a restart begins to compare the file with what was read of it."""

    size: int
    """Bytes of the file when it was opened."""
    changed: int
    """Time of its last change, nanoseconds since 1970."""
    offset: int
    """Bytes of the file before the place."""
    checksum: int
    """CRC-32 of these bytes."""


class Position(NamedTuple):
    """A place in a list of pieces, in front of a document."""

    piece: int = 0
    """Position in the list."""
    document: int = 0
    """Number of the document (line or row, blank ones counted) within its shard."""
    turn: int = 0
    """Good documents of the shard before this one."""
    checksum: int | None = 0
    """CRC-32 of all that the shard holds before this document; None where a checkpoint of order 1 lacks it, and on the
    hub, where a commit's files do not change."""
    offset: int | None = 0
    """Bytes of the shard, decompressed, before this document; None in files that are not of lines, and where an older
    checkpoint lacks it."""
    landmark: Landmark | None = None
    """Place at which a restart begins to compare; None to compare from the beginning of the shard."""


START = Position()


class Record(NamedTuple):
    """A document as read, or the problem with it."""

    piece: int
    """Position in the list of pieces that is being read."""
    document: int
    """Number of the document within its shard."""
    text: str
    """Text of the document; empty if there is a problem."""
    id: str
    """File and, within files of many documents, line or row."""
    problem: str | None = None
    """The problem, naming file and line; None if there is none."""
    turn: int = 0
    """Good documents of the shard up to this one, which is counted too."""
    checksum: int | None = None
    """CRC-32 of all that the shard holds up to the end of this document; None if unknown."""
    offset: int | None = None
    """Bytes of the shard, decompressed, up to the end of this document; None if unknown."""
    landmark: Landmark | None = None
    """Place before it at which a restart begins to compare; None for the beginning of the shard."""
    tokens: np.ndarray | None = None
    """Ids of the document, int32, with or without its text; None where its text is still to be encoded."""

    @property
    def size(self) -> int:
        """Length of the document, in characters or token ids; 0 where there is none."""
        return len(self.text) if self.tokens is None else len(self.tokens)

    @property
    def end(self) -> Position:
        """The position behind it."""
        return Position(self.piece, self.document + 1, self.turn, self.checksum, self.offset, self.landmark)


class Source(Protocol):
    """A source of documents."""

    config: SourceConfig
    order: int
    """Order of documents, as in `ORDER`."""
    num_shards: int
    shard_sizes: list[int]
    """Relative sizes by which shards are dealt to lanes."""
    tokenizer_fingerprint: str | None
    """Fingerprint of the tokenizer that has made the token ids of its documents; None where they are text."""
    num_tokens: int | None
    """Number of token ids of all documents, their ends counted; None where they are text."""
    announced_skipping: bool
    """Whether the skipping of bad documents was announced."""

    def read(self, pieces: list[Piece], first: Position = START) -> Iterator[Record]:
        """Records of `pieces` in order, from `first` on. Lanes that read parts of a shard take turns with its good
        documents; a bad one comes to the lane whose turn it is, and to all where bad documents are errors."""

    def identity(self) -> dict[str, Any]:
        """Identity of the documents and their order, as JSON; see `xlstm_lm.data.fingerprint`."""

    def name_of(self, shard: int) -> str:
        """Name of a shard in messages."""


def refuse(source: Source, record: Record) -> None:
    """Stop at a bad document, or say once that such are skipped.

    Raises:
        ValueError: bad documents are errors in this source.
    """
    assert record.problem is not None
    if source.config.on_bad_document == "error":
        raise ValueError(
            f"{record.problem}. Repair the file, or set on_bad_document: skip for this source; the same command then "
            "goes on from the last checkpoint"
        )
    if not source.announced_skipping:
        source.announced_skipping = True
        announce_once(f"bad documents of {source.config.description} are skipped; the first: {record.problem}")
