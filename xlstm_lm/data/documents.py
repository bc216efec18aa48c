"""From records of a source to documents whose tokens are made as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from xlstm_lm.base.announce import announce_once
from xlstm_lm.data.chat import ChatTemplate
from xlstm_lm.data.packing import Document
from xlstm_lm.data.sources import START, Piece, Position, Record, Source, SourceConfig, refuse
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
        ValueError: a bad document, unless the source skips them; no tokenizer for a source of token ids; no chat
            template for a source of chats.
    """
    whole = [Piece(shard) for shard in range(source.num_shards)]
    if tokenizer is None and source.tokenizer_fingerprint is not None:
        raise ValueError(
            f"{source.config.description} holds token ids and no text: name the source of its text instead"
        )
    chat = chat_template(source.config, tokenizer)
    for record in (read or source.read)(whole if pieces is None else pieces, first):
        if tokenizer and record.text:
            record = _checked(record, tokenizer, chat)
        if record.problem is None:
            yield record
            continue
        refuse(source, record)
        if bad is not None:
            bad.append(record)


def _checked(record: Record, tokenizer: Tokenizer, chat: ChatTemplate | None) -> Record:
    """The record, with its problem if its text cannot be encoded; a chat is rendered and encoded."""
    try:
        if chat is not None:
            text, ids = chat.encode(record.text)
            return record._replace(text=text, tokens=ids)
        problem = tokenizer.problem(record.text)
    except ValueError as error:
        problem = str(error)
    return record if problem is None else record._replace(text="", problem=f"document {record.id}: {problem}")


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


def chat_template(source: SourceConfig, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The template that renders the documents of a source; None for a source without chats.

    Raises:
        ValueError: the source has chats, and the tokenizer no template.
    """
    if source.chat is None:
        return None
    if tokenizer is None or tokenizer.chat is None:
        which = "" if tokenizer is None else f", and the tokenizer {tokenizer.name} has no chat template"
        raise ValueError(
            f"{source.description} holds chats (chat: {source.chat}){which}: set data.tokenizer to a "
            "tokenizer with a chat_template, or name a field of text by text_field or template in place of chat"
        )
    return tokenizer.chat


def check_templates(sources: Iterable[SourceConfig], tokenizer: Tokenizer) -> None:
    """Refuse sources of chats whose tokenizer has no template. Raises the error of `chat_template`."""
    for source in sources:
        chat_template(source, tokenizer)


def chat_identity(source: SourceConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entry for the chat template in the identity of a source; empty for a source without chats."""
    template = chat_template(source, tokenizer)
    return {} if template is None else {"chat_template": template.fingerprint()}
