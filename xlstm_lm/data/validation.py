"""Held-out documents in rows: the same ones each time, and the same number of batches on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from xlstm_lm.data.batch import Batch, stack_rows
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.documents import documents, tokenized
from xlstm_lm.data.packing import Document, Row, pack
from xlstm_lm.data.sources import Source, open_source
from xlstm_lm.data.tokenizer import Tokenizer


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rows: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Batches of `rows` packed rows of the validation sources, in order.

    All ranks' batches together hold each target once; batch after batch, rank after rank they are consecutive rows.
    What is missing to a full batch on every rank is filled up with rows whose targets are all -100.

    Raises:
        ValueError: at the call, files that are missing or empty; while reading, a bad document or no document at all.
        ConnectionError: the hub does not answer.
    """
    assert rows >= 1 and 0 <= rank < world_size
    sources = [open_source(source) for source in config.validation]
    packed = validation_rows(sources, config, tokenizer)
    return batches_of_rank(packed, tokenizer.end_of_document, rows=rows, rank=rank, world_size=world_size)


def validation_rows(sources: list[Source], config: DataConfig, tokenizer: Tokenizer) -> Iterator[Row]:
    """The packed rows of the opened validation sources, those of all ranks. Raises the errors of reading them."""
    return pack(_documents(sources, config, tokenizer), config.context_length, tokenizer.end_of_document)


def batches_of_rank(
    packed: Iterable[Row], end_of_document: int, *, rows: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """The batches of one rank, `rows` rows each, out of the packed rows of all ranks, as in `validation_batches`."""
    group: list[Row] = []
    for row in packed:
        group.append(row)
        if len(group) == rows * world_size:
            yield stack_rows(group[rank * rows : (rank + 1) * rows])
            group = []
    if group:
        elements = np.full_like(group[0].elements, end_of_document)
        empty = Row(elements, np.zeros_like(group[0].resets), 0, [], None)
        group += [empty] * (rows * world_size - len(group))
        yield stack_rows(group[rank * rows : (rank + 1) * rows])


def _documents(sources: list[Source], config: DataConfig, tokenizer: Tokenizer) -> Iterator[Document]:
    for source in sources:
        left = config.validation_tokens
        for record in (record for record in documents(source, tokenizer) if record.size):
            # A document has one target more than it has tokens: its end.
            document = tokenized(record, tokenizer)
            document.pieces = _first(document.pieces, max(left - 1, 1))
            yield document  # until all of its tokens have been taken
            left -= document.num_tokens + 1
            if left <= 0:
                break
        if left == config.validation_tokens:
            raise ValueError(f"validation source {source.config.description} has no document")


def _first(pieces: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` tokens."""
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return
