"""Documents laid end to end in rows of one length: nothing padded, nothing cut off, every token predicted once.

The end-of-document token e stands between documents. The stream of a lane is e D1 e D2 e D3 ..., and row r holds its
elements r*T to r*T + T: the last target of a row is the first input of the next. An e is thus the last target of one
document and the first input of the one after it, where the model's state is reset.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


@dataclass
class Document:
    """A tokenized document on its way into rows."""

    pieces: Iterable[np.ndarray]
    """Token ids without the end-of-document token, int32, in consecutive pieces, which are made as rows need them."""
    id: str
    """Where it comes from, for messages."""
    state: dict[str, Any] | None = None
    """State of a lane that begins with this document; None outside of lanes."""
    num_tokens: int = 0
    """Number of ids that its pieces have had so far; of all pieces once `pack` reads the next document."""
    place: Any = None
    """JSON value that no other document of its lane has; None outside of lanes."""


@dataclass
class Row:
    """One packed row of T + 1 stream elements: inputs are `elements[:-1]`, targets `elements[1:]`."""

    elements: np.ndarray
    """Token ids (T + 1), int32."""
    resets: np.ndarray
    """True where an input is the end-of-document token that starts a document (T), bool."""
    num_targets: int
    """Number of targets that count, from the left: T, except in the last row of a finite stream."""
    document_ids: list[str]
    """The documents with a token in the row."""
    state: dict[str, Any] | None
    """State of the lane after this row; None outside of lanes."""
    places: list[Any] = field(default_factory=list)
    """Places of these documents in their lane."""


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
    segments: deque[_Segment] = deque()
    buffered = 0
    for segment in _segments(documents, end_of_document, offset):
        segments.append(segment)
        buffered += len(segment.elements)
        while buffered > context_length:
            yield _take_row(segments, context_length)
            buffered -= context_length
    if buffered == 0:
        return
    # The end of a finite stream: the last document's own end is still to be predicted, in a row that is filled up.
    filling = np.full(context_length + 1 - buffered, end_of_document, dtype=np.int32)
    segments.append(_Segment(Document([], ""), 0, filling))
    row = _take_row(segments, context_length)
    row.num_targets = buffered
    if row.document_ids[-1] == "":
        row.document_ids.pop()
        row.resets[buffered:] = False
    yield row


class _Segment(NamedTuple):
    """Consecutive elements of a document."""

    document: Document
    begin: int
    """Position of the first of them in the document, whose leading e is element 0."""
    elements: np.ndarray


def _segments(documents: Iterable[Document], end_of_document: int, offset: int) -> Iterator[_Segment]:
    """The elements of the stream piece by piece, without the first `offset`."""
    for document in documents:
        begin = 0
        for elements in itertools.chain([np.array([end_of_document], dtype=np.int32)], document.pieces):
            end = begin + len(elements)
            document.num_tokens = end - 1
            if end > max(begin, offset):
                first = max(begin, offset)
                yield _Segment(document, first, elements[first - begin :])
            begin = end
        offset = 0


def _take_row(segments: deque[_Segment], context_length: int) -> Row:
    """Cut a row off the front of `segments`. Its last element stays there: it begins the next row."""
    elements = np.empty(context_length + 1, dtype=np.int32)
    resets = np.zeros(context_length, dtype=bool)
    document_ids, places = [], []
    position = 0
    while True:
        document, begin, available = segments[0]
        if position < context_length:
            if begin == 0 or position == 0:
                document_ids.append(document.id)
                places.append(document.place)
            resets[position] = begin == 0
        taken = available[: context_length + 1 - position]
        elements[position : position + len(taken)] = taken
        position += len(taken)
        if position > context_length:
            offset = begin + len(taken) - 1
            segments[0] = _Segment(document, offset, available[len(taken) - 1 :])
            state = None if document.state is None else {**document.state, "offset": offset}
            return Row(elements, resets, context_length, document_ids, state, places)
        segments.popleft()
