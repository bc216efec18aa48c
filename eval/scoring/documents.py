"""The documents that a study measures on: files, patterns, or the sources of a data recipe."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from xlstm_lm.base.fields import Count, check_fields
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.data import SourceConfig, open_source
from xlstm_lm.data.documents import documents
from xlstm_lm.data.sources import Source

COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class Text(NamedTuple):
    """One document."""

    id: str
    text: str


@dataclass(kw_only=True)
class DocumentsConfig:
    """Which documents to read."""

    data: list[str]
    """Files and patterns (text: a document a file; .jsonl, .parquet: one a line or row), or one data recipe (.yaml)."""
    split_at: str | None = None
    """Regular expression: a new document begins at every line that matches, as '^PEP: ' in a file of many."""
    max_documents: Count | None = None
    """Number of documents to read from the beginning; null for all."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.data:
            raise ValueError("data is empty; name text files, JSON lines, a pattern or a data recipe.")
        try:
            re.compile(self.split_at or "")
        except re.error as error:
            raise ValueError(f"split_at {self.split_at!r} is no regular expression: {error}.") from error


def open_documents(config: DocumentsConfig) -> Iterator[Text]:
    """The documents in order, read lazily; the files are checked once, at the call.

    Of a recipe these are the documents of its validation sources, or of its sources where it has none.

    Raises:
        ValueError: at the call, files that are missing or empty; while reading, a bad document.
    """
    return _read([open_source(source) for source in document_sources(config)], config)


def document_sources(config: DocumentsConfig) -> list[SourceConfig]:
    """The sources of the documents; nothing is opened.

    Raises:
        ValueError: a recipe names no source, or one that cannot be.
    """
    if Path(config.data[0]).suffix in (".yaml", ".yml"):
        if len(config.data) > 1:
            raise ValueError(f"{config.data[0]} is a recipe and stands alone; got {' '.join(config.data[1:])} as well.")
        section = read_recipe(config.data[0])[0].get("data", {})
        found = section.get("validation") or section.get("sources")
        if not found:
            raise ValueError(f"{config.data[0]} names neither data.validation nor data.sources.")
        known = {field.name for field in fields(SourceConfig)}
        unknown = sorted({key for source in found for key in source} - known)
        if unknown:
            raise ValueError(
                f"{config.data[0]} has sources with {', '.join(unknown)}; known are {', '.join(sorted(known))}."
            )
        return [SourceConfig(**source) for source in found]
    by_kind: dict[str, list[str]] = {}
    for pattern in config.data:
        suffixes = [suffix for suffix in Path(pattern).suffixes if suffix not in COMPRESSED]
        by_kind.setdefault(KINDS.get(suffixes[-1] if suffixes else "", "text"), []).append(pattern)
    return [SourceConfig(kind=kind, paths=paths) for kind, paths in by_kind.items()]


def _read(sources: list[Source], config: DocumentsConfig) -> Iterator[Text]:
    count = 0
    for source in sources:
        for record in documents(source):
            for text in _split(record.id, record.text, config.split_at):
                if count == config.max_documents:
                    return
                count += 1
                yield text


def _split(name: str, text: str, split_at: str | None) -> Iterator[Text]:
    if split_at is None:
        yield Text(name, text)
        return
    starts = [match.start() for match in re.finditer(split_at, text, re.MULTILINE)]
    edges = sorted({0, *starts, len(text)})
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        yield Text(f"{name}:{number}", text[first:last])
