"""The training data of one rank: its lanes, read in the background, and the state of what was consumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from xlstm_lm.data.batch import Batch, stack_rows
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.hub import DatasetSource
from xlstm_lm.data.lanes import DealtSource, Lane
from xlstm_lm.data.packing import Row
from xlstm_lm.data.sources import FileSource, Source, SourceConfig
from xlstm_lm.data.tokenizer import Tokenizer
from xlstm_lm.data.worker import Worker, produce


def open_source(config: SourceConfig) -> Source:
    """The source that `config` describes, its files listed and looked at.

    Raises:
        ValueError: files that are missing or empty; a data set that is not there.
        ConnectionError: the hub does not answer.
    """
    return DatasetSource(config) if config.kind in ("hub", "parquet") else FileSource(config)


class TrainingStream:
    """Endless batches of packed rows, one row for each owned lane.

    Which tokens a lane gives depends on the data, the tokenizer, the seed, the row length and the number of lanes, all
    of them in `fingerprint()`; not on how many ranks share the lanes or how many workers read them.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, lanes: range, seed: int) -> None:
        """Open the sources, the validation ones too, so that mistakes show before any work is done.

        Args:
            config: the data section of the run.
            tokenizer: from `build_tokenizer` or `load_tokenizer`.
            lanes: the lanes this rank owns, of `config.global_batch_size`.
            seed: of the shuffle.

        Raises:
            ValueError: files that are missing or empty; a data set that is not there.
            ConnectionError: the hub does not answer.
        """
        assert len(lanes) > 0 and min(lanes) >= 0 and max(lanes) < config.global_batch_size
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        sources = [open_source(source) for source in config.sources]
        for source in config.validation:
            open_source(source)
        dealt = [DealtSource(source, config, seed, index) for index, source in enumerate(sources)]
        if 0 in lanes:
            for source in dealt:
                source.announce_sharing()
        self._sources = sources
        self._lanes = {lane: Lane(dealt, config, tokenizer, lane, seed) for lane in lanes}
        self._states = {lane: self._lanes[lane].initial_state() for lane in lanes}
        self._producers: list[tuple[list[int], Any]] = []

    def start(self) -> None:
        """Let the workers begin to read. `next_batch` does it too; calling it early hides their start-up time."""
        if self._producers:
            return
        owned = list(self._lanes)
        num_workers = min(self._config.num_workers, len(owned))
        for share in [owned[index::num_workers] for index in range(num_workers)] or [owned]:
            lanes = [self._lanes[lane] for lane in share]
            states = [self._states[lane] for lane in share]
            producer = Worker(lanes, states, self._config.prefetch_batches) if num_workers else produce(lanes, states)
            self._producers.append((share, producer))

    def next_batch(self) -> Batch:
        """One row for each owned lane, in lane order.

        Raises:
            ValueError: a bad document, named with file and line.
            ConnectionError: the hub does not answer.
        """
        self.start()
        rows: dict[int, Row] = {}
        for share, producer in self._producers:
            rows.update(zip(share, next(producer)))
        for lane, row in rows.items():
            assert row.state is not None
            self._states[lane] = row.state
        return stack_rows([rows[lane] for lane in self._lanes])

    def state_dict(self) -> dict[str, Any]:
        """Where every owned lane stands after the batches given so far: a small JSON value a lane, under its number."""
        return {str(lane): copy.deepcopy(state) for lane, state in self._states.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on where `states` (of any number of ranks and workers, put together) left off.

        Raises:
            ValueError: an owned lane is not in it.
        """
        missing = [lane for lane in self._lanes if str(lane) not in states]
        if missing:
            raise ValueError(
                f"the data state holds {len(states)} lanes but not lane {missing[0]}: it belongs to another "
                "global_batch_size, or to some of the ranks only"
            )
        self.close()
        self._states = {lane: copy.deepcopy(states[str(lane)]) for lane in self._lanes}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that, changed, would change the order of tokens, by the name of its setting; JSON values."""
        config = self._config
        values = {
            "context_length": config.context_length,
            "global_batch_size": config.global_batch_size,
            "seed": self._seed,
            "shuffle": config.shuffle,
            "shuffle_documents": config.shuffle_documents,
            "tokenizer": self._tokenizer.fingerprint(),
            "sources": [source.identity() | {"weight": source.config.weight} for source in self._sources],
        }
        return json.loads(json.dumps(values))

    @property
    def epoch(self) -> int:
        """How many times the owned lane and source that are furthest back have been read from end to end."""
        return min(source["epoch"] for state in self._states.values() for source in state["sources"])

    @property
    def skipped_documents(self) -> int:
        """Bad documents that the owned lanes have skipped, up to the blocks being read."""
        return sum(source["skipped"] for state in self._states.values() for source in state["sources"])

    def close(self) -> None:
        """End the workers; the stream can be started again and goes on with the next batch."""
        for _, producer in self._producers:
            producer.close()
        self._producers = []
