"""Data sets on the Hugging Face hub, whose files and columns `datasets` finds.

One process opens the data set; others get the opened source, and only fetch the files that they read. Parquet and JSON
lines are fetched by ranges of bytes. Files of other kinds are read through `datasets`, which every process opens.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow

from xlstm_lm.data.sources.config import KINDS, SourceConfig
from xlstm_lm.data.sources.contents import HEAD_BYTES, READ_ERRORS, open_text
from xlstm_lm.data.sources.fields import Fields, text_identity, text_setting
from xlstm_lm.data.sources.hub_file import HubFile
from xlstm_lm.data.sources.patience import NOT_THERE, Patience, UnreachableError, may_pass, status_of
from xlstm_lm.data.sources.readers import ALL, Shard, Turns
from xlstm_lm.data.sources.record import ORDER, START, Piece, Position, Record

READ_BY_RANGES = {"JsonConfig": "jsonl", "ParquetConfig": "parquet"}
"""Kinds whose readers read the files that a builder of `datasets` has found, by the class of its configuration."""
ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}


class HubSource:
    """A streaming data set on the hub; its shards are the files of the split."""

    def __init__(self, config: SourceConfig, order: int = ORDER) -> None:
        """Open the data set.

        Raises:
            ValueError: no such data set, split, configuration or file; no column with the text; offline mode.
            ConnectionError: the hub does not answer for `retry_seconds`.
        """
        self.config = config
        self.order = order
        self.announced_skipping = False
        self.tokenizer_fingerprint = self.num_tokens = None
        _refuse_offline(config)
        self._fields = Fields.of(config)
        self._files: list[str] = []
        self._kind: str | None = None
        """The kind of `KINDS` that reads the files by ranges; None where `datasets` reads them."""
        self.commit: str = Patience(config).call(self._newest_commit)
        """Commit of the data set that is read."""
        self._dataset = Patience(config).call(self._open)
        self.num_shards: int = self._dataset.num_shards
        self.shard_sizes = [1] * self.num_shards
        features = self._dataset.features
        absent = next((name for name in self._fields.names if features is not None and name not in features), None)
        if features is not None and absent is not None:
            raise ValueError(
                f"{config.description} has no column {absent!r}: set {text_setting(config)} to one of "
                f"{', '.join(features)}"
            )
        if len(self._files) != self.num_shards or any(ARCHIVES & set(Path(file).suffixes) for file in self._files):
            self._kind = None
        if self._kind == "jsonl" and not self._begins_with_an_object():
            self._kind = None  # an array, which only `datasets` can read

    def __getstate__(self) -> dict[str, Any]:
        # Connections do not travel; another process opens the data set itself where it has to.
        return {**self.__dict__, "_dataset": None}

    def _newest_commit(self) -> str | None:
        """The current commit of the wanted revision, which all processes then read."""
        from huggingface_hub import HfApi

        assert self.config.dataset is not None
        return HfApi().dataset_info(self.config.dataset, revision=self.config.revision).sha

    def _open(self) -> Any:
        from datasets import load_dataset_builder

        builder = load_dataset_builder(
            f"hf://datasets/{self.config.dataset}",  # never a local folder of that name
            self.config.config_name,
            data_files=self.config.data_files or None,
            revision=self.commit,
        )
        features = builder.info.features
        if hasattr(builder.config, "columns") and (
            features is None or all(name in features for name in self._fields.names)
        ):
            # Of parquet only the text is read: whatever else the files hold, and however they differ in it.
            builder.config.columns = list(self._fields.names)
        if hasattr(builder.config, "on_bad_files") and self.config.on_bad_document == "skip":
            builder.config.on_bad_files = "skip"  # while columns are looked up
        opened = builder.as_streaming_dataset(split=self.config.split)
        if not opened.features and hasattr(builder.config, "columns"):
            # No such column: the message needs the names of those that are there.
            builder.config.columns, builder.info.features = None, None
            opened = builder.as_streaming_dataset(split=self.config.split)
        builder.config.on_bad_files = "error"
        self._files = [str(file) for file in (builder.config.data_files or {}).get(self.config.split, ())]
        by_ranges = getattr(builder.config, "field", None) is None
        self._kind = READ_BY_RANGES.get(type(builder.config).__name__) if by_ranges else None
        return opened

    def _begins_with_an_object(self) -> bool:
        """Whether the first file that can be read begins with a JSON object that ends on its first line."""
        for file in self._files:
            with suppress(*READ_ERRORS), open_text(partial(self._file, file)) as opened:
                line = opened.readline(HEAD_BYTES).strip()
                if not line or (len(line) < HEAD_BYTES - 1 and not line.endswith(b"}")):
                    return False
                return line.startswith(b"{")
        return False

    def _file(self, location: str) -> Any:
        """A file of the data set, by the name hf://datasets/ID@COMMIT/PATH that `datasets` gives it."""
        from huggingface_hub import hf_hub_url

        assert self.config.dataset is not None
        path = location.partition(f"@{self.commit}/")[2]
        url = hf_hub_url(self.config.dataset, path, repo_type="dataset", revision=self.commit)
        if self._kind == "parquet":
            return pyarrow.PythonFile(HubFile(url, self.config, ahead=False), mode="r")
        return io.BufferedReader(HubFile(url, self.config, ahead=True), buffer_size=HEAD_BYTES * 64)

    def read(self, pieces: list[Piece], first: Position = START) -> Iterator[Record]:
        shards = [
            self._shard(index, pieces[index], first if index == first.piece else Position(index))
            for index in range(first.piece, len(pieces))
        ]
        return self._read_through_datasets(shards) if self._kind is None else self._read_by_ranges(shards)

    def _shard(self, index: int, piece: Piece, first: Position) -> Shard:
        name = self.name_of(piece.shard)
        if self._kind is None:
            return Shard(index, name, name, piece, first)
        location = self._files[piece.shard]
        # A commit does not change: no checksum is needed to tell. Lines were always counted without blank ones.
        return Shard(
            index,
            name,
            name,
            piece,
            first._replace(checksum=None),
            opener=partial(self._file, location),
            origin=f"{location}: ",
            is_fixed=True,
            counts_blank_lines=False,
        )

    def _read_by_ranges(self, shards: list[Shard]) -> Iterator[Record]:
        unreachable = UnreachableError  # at exit, globals are gone before generators are closed
        assert self._kind is not None
        reader = resolve_name(KINDS[self._kind].reader)
        try:
            yield from reader(shards, self._fields, self.order, self.config.on_bad_document == "error")
        except unreachable as error:
            raise error.reason from None

    def _read_through_datasets(self, shards: list[Shard]) -> Iterator[Record]:
        if self._dataset is None:
            self._dataset = Patience(self.config).call(self._open)
        for shard in shards:
            begin = shard.first
            turns = Turns(shard, self.order, self.config.on_bad_document == "error")
            if begin.document == ALL:
                continue
            count = begin.document
            try:
                for document, row in self._read_rows(shard.piece.shard, begin.document):
                    count = document + 1
                    text, problem = self._fields.text(row)
                    if record := turns.record(document, text, problem, "document", begin.checksum):
                        yield record
            except DamagedFileError as error:
                if record := turns.broken_off(count, error, "document"):
                    yield record

    def _read_rows(self, shard: int, document: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of a shard from number `document` on; after an interruption it is opened again where it broke off."""
        opened = self._dataset.shard(num_shards=self.num_shards, index=shard)
        patience = Patience(self.config)
        while True:
            rows = iter(opened.skip(document))
            try:
                for row in rows:
                    yield document, row
                    document += 1
                    patience = Patience(self.config)
                return
            except Exception as error:
                if _is_damage(error):
                    file = f"{self._files[shard]}: " if len(self._files) == self.num_shards else ""
                    raise DamagedFileError(f"{file}{error}") from error
                patience.wait(error)

    def name_of(self, shard: int) -> str:
        return f"{self.config.dataset}:{self.config.split}:{shard}"

    def identity(self) -> dict[str, Any]:
        identity = {"kind": self.config.kind, "files": self.num_shards, **text_identity(self.config)}
        names = ("dataset", "config_name", "data_files", "split")
        return identity | {name: getattr(self.config, name) for name in names} | {"revision": self.commit}


def _refuse_offline(config: SourceConfig) -> None:
    """Say at once that no waiting helps where connections are switched off.

    Raises:
        ValueError: offline mode is on.
    """
    import datasets.config
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        switched = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        raise ValueError(
            f"{config.description} cannot be read: {switched or 'offline mode'} is set, which forbids connections "
            "to the hub; unset it, or download the files and name them in a source of kind parquet or jsonl"
        )


class DamagedFileError(Exception):
    """A file of a data set arrived and cannot be read from some place on."""


def _is_damage(error: Exception) -> bool:
    """Whether a file is to blame, not the way to it."""
    from_system = isinstance(error, NOT_THERE) or getattr(error, "errno", None) is not None
    content = isinstance(error, (*READ_ERRORS, UnicodeDecodeError, json.JSONDecodeError))
    return content and not from_system and status_of(error) is None and not may_pass(error)
