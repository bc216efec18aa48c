"""Documents laid end to end in rows of one length: nothing padded, nothing cut off, every token predicted once.

The end-of-document token e stands between documents. The stream of a lane is e D1 e D2 e D3 ..., and row r holds its
elements r*T to r*T + T: the last target of a row is the first input of the next. An e is thus the last target of one
document and the first input of the one after it, where the model's state is reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Document:
    """A tokenized document on its way into rows."""

    tokens: np.ndarray
    """Token ids without the end-of-document token, int32."""
    id: str
    """Where it comes from, for messages."""
    state: dict[str, Any] | None = None
    """What a lane needs to begin again with this document."""


@dataclass
class Row:
    """One packed row of T + 1 stream elements: inputs are `elements[:-1]`, targets `elements[1:]`."""

    elements: np.ndarray
    """Token ids (T + 1), int32."""
    resets: np.ndarray
    """True where an input is the end-of-document token that starts a document (T), bool."""
    num_targets: int
    """How many targets count, from the left: T but for the last row of a finite stream."""
    document_ids: list[str]
    """The documents with a token in the row."""
    state: dict[str, Any] | None
    """What a lane needs to go on after this row."""


def pack(documents: Iterable[Document], context_length: int, end_of_document: int, offset: int = 0) -> Iterator[Row]:
    """Pack documents in rows.

    Args:
        documents: in their order; an endless iterable gives endless rows. Where it ends, the last row is filled up with
            end-of-document tokens that count neither as targets nor as document starts.
        context_length: T, the number of inputs of a row.
        end_of_document: the id of the token between documents.
        offset: how many elements of the first document (its leading e counted) an earlier row has used up: the
            `offset` of that row's state.

    Yields:
        rows, each with the state after it: that of the document which the next row begins in, plus `offset`.
    """
    segments: deque[tuple[Document, np.ndarray]] = deque()
    buffered = 0
    for document in documents:
        elements = np.empty(len(document.tokens) + 1, dtype=np.int32)
        elements[0] = end_of_document
        elements[1:] = document.tokens
        segments.append((document, elements))
        buffered += len(elements) - (offset if len(segments) == 1 else 0)
        while buffered > context_length:
            row, offset = _take_row(segments, offset, context_length)
            buffered -= context_length
            yield row
    # The end of a finite stream: the last document's own end is still to be predicted.
    end = Document(tokens=np.empty(0, dtype=np.int32), id="")
    segments.append((end, np.array([end_of_document], dtype=np.int32)))
    buffered += 1
    while buffered > 1:
        num_targets = min(buffered - 1, context_length)
        padding = np.full(context_length - num_targets, end_of_document, dtype=np.int32)
        segments[-1] = (end, np.concatenate([segments[-1][1], padding]))
        row, offset = _take_row(segments, offset, context_length)
        row.num_targets = num_targets
        if row.document_ids[-1] == "":
            row.document_ids.pop()
            row.resets[num_targets:] = False
        yield row
        buffered -= num_targets


def _take_row(segments: deque[tuple[Document, np.ndarray]], offset: int, context_length: int) -> tuple[Row, int]:
    """Cut a row off the front of `segments`; returns it and the offset at which the next row begins."""
    elements = np.empty(context_length + 1, dtype=np.int32)
    resets = np.zeros(context_length, dtype=bool)
    document_ids = []
    position = 0
    while True:
        document, segment = segments[0]
        if position < context_length:
            document_ids.append(document.id)
            resets[position] = offset == 0
        taken = segment[offset : offset + context_length + 1 - position]
        elements[position : position + len(taken)] = taken
        position += len(taken)
        if position > context_length:
            # The next row begins with this row's last element.
            offset += len(taken) - 1
            state = None if document.state is None else {**document.state, "offset": offset}
            return Row(elements, resets, context_length, document_ids, state), offset
        segments.popleft()
        offset = 0
