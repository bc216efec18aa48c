"""From records of a source to documents whose tokens are made as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xlstm_lm.base.announce import announce_once
from xlstm_lm.data.packing import Document
from xlstm_lm.data.sources import START, Piece, Position, Record, Source, refuse
from xlstm_lm.data.tokenizer import Tokenizer

Read = Callable[[list[Piece], Position], Iterator[Record]]
"""Gives the records of pieces from a position on, as `Source.read` does."""
LONG_DOCUMENT = 1 << 24  # characters


def documents(
    source: Source,
    tokenizer: Tokenizer | None = None,
    pieces: list[Piece] | None = None,
    first: Position = START,
    bad: list[Record] | None = None,
    read: Read | None = None,
) -> Iterator[Record]:
    """Good documents of a source in order, empty ones included.

    Args:
        source: the source.
        tokenizer: documents that it cannot encode count as bad; None checks nothing.
        pieces: the shares of shards to read; None for all shards.
        first: the position to begin at.
        bad: bad documents are added here as they are skipped; None forgets them.
        read: reads the records; None for the source's own method.

    Raises:
        ValueError: a bad document, unless the source skips them; no tokenizer for a source of token ids.
    """
    whole = [Piece(shard) for shard in range(source.num_shards)]
    if tokenizer is None and source.tokenizer_fingerprint is not None:
        raise ValueError(
            f"{source.config.description} holds token ids and no text: name the source of its text instead"
        )
    for record in (read or source.read)(whole if pieces is None else pieces, first):
        problem = tokenizer.problem(record.text) if tokenizer and record.text else None
        if problem is not None:
            record = record._replace(text="", problem=f"document {record.id}: {problem}")
        if record.problem is None:
            yield record
            continue
        refuse(source, record)
        if bad is not None:
            bad.append(record)


def tokenized(record: Record, tokenizer: Tokenizer, state: dict[str, Any] | None = None, place: Any = None) -> Document:
    """The document of `record`. Taking its pieces raises ValueError, with its name, where it cannot be encoded."""
    return Document(_pieces(record, tokenizer), record.id, state, place=place)


def _pieces(record: Record, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    if record.tokens is not None:
        yield record.tokens
        return
    if len(record.text) > LONG_DOCUMENT:
        announce_once(f"{record.id} is a document of {len(record.text):,} characters; encoding it piece by piece")
    try:
        yield from tokenizer.encode_pieces(record.text)
    except ValueError as error:
        raise ValueError(f"document {record.id}: {error}") from None
