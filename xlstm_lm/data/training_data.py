"""Training data: the documents of the data section, or any other source of rows of tokens in lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from xlstm_lm.data.batch import Batch
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.documents import check_templates
from xlstm_lm.data.opened import Commit, Opened, open_sources
from xlstm_lm.data.packing import Row
from xlstm_lm.data.stream import TrainingStream
from xlstm_lm.data.tokenizer import build_tokenizer
from xlstm_lm.data.validation import batches_of_rank, validation_rows

OnFirst = Callable[[Callable[[], Any]], Any]
"""Runs an action on rank 0 and returns its result on every rank; an error there is raised on every rank."""


class Vocabulary(Protocol):
    """The part of a tokenizer that training needs; data that is no text has a substitute for it."""

    vocab_size: int
    """Number of ids; every id is below it."""
    bytes_per_token: torch.Tensor
    """Bytes of text each id stands for, int64 (V,); all 0 where tokens are no text."""

    def fingerprint(self) -> str:
        """Changes when ids come to mean something else."""

    def save(self, folder: Path) -> None:
        """Write files into `folder`, for a checkpoint."""


class Stream(Protocol):
    """Endless batches, a row for each owned lane; see `TrainingStream` for what each method promises."""

    def start(self) -> None: ...
    def next_batch(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, states: Mapping[str, Any], fingerprint: Mapping[str, Any] | None = None) -> None: ...
    def pass_over(self, places: Mapping[str, list[Any]]) -> None: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def differences(self, fingerprint: Mapping[str, Any], states: Mapping[str, Any]) -> list[str]: ...
    def close(self) -> None: ...


class TrainingData(Protocol):
    """Training and held-out rows. The rows of a lane depend on the lane and the seed alone."""

    tokenizer: Vocabulary
    """Meaning of the token ids."""

    def share(
        self, on_first: OnFirst, fingerprint: Mapping[str, Any] | None, commits: Sequence[Commit]
    ) -> list[Commit]:
        """Open what is to be read once, on rank 0, for all ranks. Collective; a single process need not call it.

        Args:
            on_first: `World.on_first`, which gives all ranks the result of rank 0.
            fingerprint: That of the stream to continue; None for a new run.
            commits: Commits of the hub at which the run has read before.

        Returns:
            the commits at which it reads now, to be kept with the run.
        """

    def stream(self, lanes: range, seed: int) -> Stream:
        """The rows of the lanes of one rank."""

    def validation_batches(self, *, rows: int, rank: int, world_size: int) -> Iterator[Batch] | None:
        """Batches of `rows` held-out rows, as many on every rank and the same each time; None if there are none."""


class DocumentData:
    """The documents that the data section of a run names."""

    def __init__(self, config: DataConfig) -> None:
        """Load the tokenizer.

        Raises:
            ValueError: the section names a task instead of documents, the tokenizer cannot be loaded, or it has no
                template for a source of chats.
        """
        if config.task is not None:
            raise ValueError(
                f"data.task is {config.task}: its rows are made up, not read from documents. Train this run, or go on "
                "with it, by: python -m eval.tasks --run FOLDER/config.yaml"
            )
        self.config = config
        self.tokenizer = build_tokenizer(config.tokenizer)
        check_templates((*config.sources, *config.validation), self.tokenizer)
        self._opened: Opened | None = None
        self._on_first: OnFirst = lambda action: action()
        self._held_out: dict[tuple[int, int, int], list[Batch]] = {}
        """Batches of validation rows by rows, rank and number of ranks."""

    def share(
        self, on_first: OnFirst, fingerprint: Mapping[str, Any] | None, commits: Sequence[Commit]
    ) -> list[Commit]:
        """Open the sources on rank 0 for all ranks, as in `TrainingData`. Raises the errors of `open_sources`."""
        self._on_first = on_first
        self._opened = on_first(lambda: open_sources(self.config, fingerprint, commits))
        return self._opened.commits

    def stream(self, lanes: range, seed: int) -> TrainingStream:
        """The rows of the lanes of one rank. Raises the errors of `TrainingStream`."""
        return TrainingStream(self.config, self.tokenizer, lanes=lanes, seed=seed, opened=self._opened)

    def validation_batches(self, *, rows: int, rank: int, world_size: int) -> Iterator[Batch] | None:
        """Batches of held-out rows, as in `TrainingData`. Raises the errors of `xlstm_lm.data.validation_batches`.

        The first call reads and tokenizes, on rank 0 alone if the data is shared, and is then collective. Every rank
        keeps its rows.
        """
        if not self.config.validation:
            return None
        key = (rows, rank, world_size)
        if key not in self._held_out:
            packed = self._on_first(self._validation_rows)
            end = self.tokenizer.end_of_document
            self._held_out[key] = list(batches_of_rank(packed, end, rows=rows, rank=rank, world_size=world_size))
        return iter(self._held_out[key])

    def _validation_rows(self) -> list[Row]:
        if self._opened is None:
            self._opened = open_sources(self.config)
        return list(validation_rows(self._opened.validation, self.config, self.tokenizer))
