"""From records of a source to documents whose tokens are made as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from xlstm_lm.data.packing import Document
from xlstm_lm.data.sources import Record
from xlstm_lm.data.tokenizer import Tokenizer
from xlstm_lm.ops.announce import announce_once

LONG_DOCUMENT = 1 << 24  # characters


def checked(records: Iterable[Record], tokenizer: Tokenizer) -> Iterator[Record]:
    """The records, those whose text the tokenizer cannot encode marked as bad."""
    for record in records:
        problem = tokenizer.problem(record.text) if record.text else None
        yield record if problem is None else record._replace(text="", problem=f"document {record.id}: {problem}")


def tokenized(record: Record, tokenizer: Tokenizer, state: dict[str, Any] | None = None) -> Document:
    """The document of `record`. Taking its pieces raises ValueError, with its name, where it cannot be encoded."""
    return Document(_pieces(record, tokenizer), record.id, state)


def _pieces(record: Record, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    if len(record.text) > LONG_DOCUMENT:
        announce_once(f"{record.id} is a document of {len(record.text):,} characters; encoding it piece by piece")
    try:
        yield from tokenizer.encode_pieces(record.text)
    except ValueError as error:
        raise ValueError(f"document {record.id}: {error}") from None
