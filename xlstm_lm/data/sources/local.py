"""Documents of local files: whole files, lines, JSON lines, rows of parquet."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow
import pyarrow.parquet

from xlstm_lm.base.announce import announce_once
from xlstm_lm.data.sources.config import KINDS, SourceConfig
from xlstm_lm.data.sources.contents import (
    BYTE_ORDER_MARK,
    HEAD_BYTES,
    READ_ERRORS,
    Contents,
    hash_files,
    open_parquet,
    open_text,
)
from xlstm_lm.data.sources.fields import Fields, text_identity, text_setting
from xlstm_lm.data.sources.listing import list_files, stdlib_files
from xlstm_lm.data.sources.patience import UnreachableError
from xlstm_lm.data.sources.places import is_remote, size_of
from xlstm_lm.data.sources.readers import Shard
from xlstm_lm.data.sources.record import ORDER, START, Piece, Position, Record

JSON_NAMES = {".json", ".jsonl", ".ndjson"}
JSON_BEGINNING = re.compile(rb'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')
"""First bytes of a JSON object, or an array of objects, on one line or several."""


class FileSource:
    """Documents of local files; each file is a shard."""

    def __init__(self, config: SourceConfig, order: int = ORDER) -> None:
        """List and look at the files.

        Raises:
            ValueError: a pattern without a file, or an empty file (unless bad documents are to be skipped); no column
                of parquet with the text.
        """
        self.config = config
        self.order = order
        self.announced_skipping = False
        self.tokenizer_fingerprint: str | None = None
        self.num_tokens: int | None = None
        # Names identify documents wherever the files lie: an installation's own path is no part of them.
        if config.kind == "python_stdlib":
            self.names, self.paths = stdlib_files(config.split)
        else:
            self.names = self.paths = list_files(config, order)
        self._sizes = [size_of(path) for path in self.paths]
        self.shard_sizes = self._sizes
        self.num_shards = len(self.paths)
        if look := KINDS[config.kind].look:
            resolve_name(look)(self)

    def read(self, pieces: list[Piece], first: Position = START) -> Iterator[Record]:
        shards = [
            Shard(
                index,
                self.paths[piece.shard],
                self.names[piece.shard],
                piece,
                first if index == first.piece else Position(index),
                is_fixed=is_remote(self.paths[piece.shard]),
            )
            for index, piece in enumerate(pieces)
            if index >= first.piece
        ]
        unreachable = UnreachableError  # at exit, globals are gone before generators are closed
        kind = KINDS[self.config.kind]
        fields = Fields.of(self.config) if kind.has_text_field else None
        try:
            yield from resolve_name(kind.reader)(shards, fields, self.order, self.config.on_bad_document == "error")
        except unreachable as error:
            raise error.reason from None

    def name_of(self, shard: int) -> str:
        return self.paths[shard]

    @cached_property
    def _contents(self) -> Contents:
        return hash_files(self.paths)

    def identity(self) -> dict[str, Any]:
        files = [[Path(name).name, size] for name, size in zip(self.names, self._sizes)]
        identity = {
            "kind": self.config.kind,
            "files": self.num_shards,
            "digest": digest(files),
            "sizes": self.shard_sizes,
            "contents": "".join(self._contents.digests),
            "newest": self._contents.newest,
        }
        return identity | (text_identity(self.config) if KINDS[self.config.kind].has_text_field else {})


def check_column(source: FileSource) -> None:
    """Look into the first file for the column with the text, unless what is bad is skipped.

    Raises:
        ValueError: the file is no parquet, or has no such column of text.
    """
    if source.config.on_bad_document == "skip":
        return
    try:
        with open_parquet(source.paths[0]) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            types = dict(zip(file.schema_arrow.names, file.schema_arrow.types)) if file.metadata.num_rows else None
    except READ_ERRORS as error:
        raise ValueError(
            f"parquet {source.paths[0]} cannot be read ({error}): repair the file, or set "
            "on_bad_document: skip for this source"
        ) from error
    fields = Fields.of(source.config)
    wanted, fits, offered = "text", _is_text, _is_text
    if source.config.template is not None:
        fits = _can_be_text
    if source.config.chat is not None:
        wanted, fits, offered = "a list of messages", _can_be_chat, _can_be_chat
    unfit = next((name for name in fields.names if types is not None and not fits(types.get(name))), None)
    if types is None or unfit is None:
        return
    kind, others = types.get(unfit), ", ".join(name for name in types if offered(types[name]))
    found = "has no column" if kind is None else f"holds {kind}, not {wanted}, in column"
    raise ValueError(
        f"parquet {source.paths[0]} {found} {unfit!r}: set {text_setting(source.config)} to one of "
        f"{others or f'(it has no column of {wanted})'}"
    )


def point_out_json(source: FileSource) -> None:
    """Say so if files of JSON are read as plain text: by their names, or by what the first one begins with."""
    found = next((path for path in source.paths if JSON_NAMES & set(Path(path.lower()).suffixes)), None)
    if found is None and _begins_with_json(source.paths[0]):
        found = source.paths[0]
    if found is not None:
        announce_once(
            f"{source.config.description}: {found} holds JSON and is read as plain text, names and quotes included; "
            "to read one field of an object a line, set kind: jsonl and text_field"
        )


def _is_text(kind: pyarrow.DataType | None) -> bool:
    if isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def _can_be_text(kind: pyarrow.DataType | None) -> bool:
    return _is_text(kind) or (kind is not None and (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)))


def _can_be_chat(kind: pyarrow.DataType | None) -> bool:
    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) if kind is not None else False
    return lists and pyarrow.types.is_struct(kind.value_type)  # type: ignore[union-attr]


def _begins_with_json(path: str) -> bool:
    """Whether a file begins with a JSON object or an array of objects."""
    try:
        with open_text(path) as file:
            return JSON_BEGINNING.match(file.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)) is not None
    except READ_ERRORS:
        return False  # or a damaged file: reading it says why


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
