"""Data sets on the Hugging Face hub, opened by `datasets`.

What goes wrong on the way to the hub is retried with growing pauses; what no waiting can repair is said at once.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from xlstm_lm.data.sources.config import SourceConfig
from xlstm_lm.data.sources.contents import READ_ERRORS
from xlstm_lm.data.sources.readers import ALL, Shard, Turns, text_of
from xlstm_lm.data.sources.record import ORDER, START, Piece, Position, Record

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError)
logger = logging.getLogger("xlstm_lm")


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
        _refuse_offline(config)
        self._files: list[str] = []
        self._revision = Patience(config).call(self._newest_revision)
        self._dataset = Patience(config).call(self._open)
        self.num_shards: int = self._dataset.num_shards
        self.shard_sizes = [1] * self.num_shards
        features = self._dataset.features
        if features is not None and config.text_field not in features:
            raise ValueError(
                f"{config.description} has no column {config.text_field!r}: set text_field to one of "
                f"{', '.join(features)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the data set itself: connections do not travel.
        return {**self.__dict__, "_dataset": None}

    def _newest_revision(self) -> str | None:
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
            revision=self._revision,
        )
        features = builder.info.features
        if hasattr(builder.config, "columns") and (features is None or self.config.text_field in features):
            # Of parquet only the text is read: whatever else the files hold, and however they differ in it.
            builder.config.columns = [self.config.text_field]
        if hasattr(builder.config, "on_bad_files") and self.config.on_bad_document == "skip":
            builder.config.on_bad_files = "skip"  # while columns are looked up
        opened = builder.as_streaming_dataset(split=self.config.split)
        if not opened.features and hasattr(builder.config, "columns"):
            # No such column: the message needs the names of those that are there.
            builder.config.columns, builder.info.features = None, None
            opened = builder.as_streaming_dataset(split=self.config.split)
        builder.config.on_bad_files = "error"
        self._files = [str(file) for file in (builder.config.data_files or {}).get(self.config.split, ())]
        return opened

    def read(self, pieces: list[Piece], first: Position = START) -> Iterator[Record]:
        if self._dataset is None:
            self._dataset = Patience(self.config).call(self._open)
        for index in range(first.piece, len(pieces)):
            piece = pieces[index]
            name = self.name_of(piece.shard)
            begin = first if index == first.piece else Position(index)
            turns = Turns(Shard(index, name, name, piece, begin), self.order, self.config.on_bad_document == "error")
            if begin.document == ALL:
                continue
            count = begin.document
            try:
                for document, row in self._read_shard(piece.shard, begin.document):
                    count = document + 1
                    text, problem = text_of(row, self.config.text_field)
                    if record := turns.record(document, text, problem, "document", begin.checksum):
                        yield record
            except DamagedFileError as error:
                if record := turns.broken_off(count, error, "document"):
                    yield record

    def _read_shard(self, shard: int, document: int) -> Iterator[tuple[int, dict[str, Any]]]:
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
        identity = {"kind": self.config.kind, "files": self.num_shards, "text_field": self.config.text_field}
        names = ("dataset", "config_name", "data_files", "split")
        return identity | {name: getattr(self.config, name) for name in names} | {"revision": self._revision}


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


class Patience:
    """Waits out a hub that does not answer, for as long as the source allows."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._pause = FIRST_PAUSE_SECONDS
        self._began: float | None = None

    def call(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, tried again while it fails for reasons that may pass."""
        while True:
            try:
                return action()
            except Exception as error:
                self.wait(error)

    def wait(self, error: Exception) -> None:
        """Pause before the next try, or raise if `error` will not pass or the time is over.

        Raises:
            ValueError: the data set, split or file is not there, or cannot be read.
            ConnectionError: no answer for `retry_seconds`.
        """
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        if not _may_pass(error):
            raise ValueError(
                f"{self._config.description} cannot be read ({reason}); check dataset, config_name, split, revision "
                "and data_files, and that your account may read it"
            ) from error
        now = time.monotonic()
        self._began = self._began or now
        if now - self._began + self._pause > self._config.retry_seconds:
            raise ConnectionError(
                f"{self._config.description} has not answered for {self._config.retry_seconds:.0f} s ({reason}); "
                "the same command goes on from the last checkpoint once it does. "
                "retry_seconds of the source says how long to wait"
            ) from error
        logger.warning("%s does not answer (%s); next try in %.0f s", self._config.description, reason, self._pause)
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer that is an error."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)


def _is_damage(error: Exception) -> bool:
    """Whether a file is to blame, not the way to it."""
    from_system = isinstance(error, NOT_THERE) or getattr(error, "errno", None) is not None
    content = isinstance(error, (*READ_ERRORS, UnicodeDecodeError, json.JSONDecodeError))
    return content and not from_system and _status(error) is None and not _may_pass(error)


def _may_pass(error: Exception) -> bool:
    """Whether waiting can help: no connection, or an answer such as 429 or 503; not a name that is wrong."""
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, NOT_THERE):
        return False
    network = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "aiohttp", "requests", "urllib3")
    return isinstance(error, (ConnectionError, TimeoutError)) or network
