"""The training data of one rank: its lanes, read in the background, and the state of what was consumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.errors import some_of
from xlstm_lm.data.batch import Batch, stack_rows
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.documents import chat_identity, chat_template
from xlstm_lm.data.fingerprint import changed_files, fingerprint_differences, source_differences
from xlstm_lm.data.lanes import DealtSource, Lane
from xlstm_lm.data.opened import Opened, commits_of, open_sources
from xlstm_lm.data.packing import Row
from xlstm_lm.data.sources import Piece, Source
from xlstm_lm.data.tokenizer import Tokenizer
from xlstm_lm.data.worker import Worker, produce


class TrainingStream:
    """Endless batches of packed rows, one row for each owned lane.

    Which tokens a lane gives depends on the data, the tokenizer, the seed, the row length and the number of lanes, all
    of them in `fingerprint()`; not on how many ranks share the lanes or how many workers read them.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, lanes: range, seed: int, opened: Opened | None = None
    ) -> None:
        """Open the sources, the validation ones too: mistakes show before any work is done.

        Args:
            config: the data section of the run.
            tokenizer: from `build_tokenizer` or `load_tokenizer`.
            lanes: the lanes this rank owns, of `config.global_batch_size`.
            seed: of the shuffle.
            opened: the sources of `config`, as another process opened them; None opens them here.

        Raises:
            ValueError: files that are missing or empty; a data set that is not there.
            ConnectionError: the hub does not answer.
        """
        assert len(lanes) > 0 and min(lanes) >= 0 and max(lanes) < config.global_batch_size
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._open(opened or open_sources(config), lanes)
        if 0 in lanes:
            for source in self._dealt:
                source.announce_sharing()
        self._producers: list[tuple[list[int], Any]] = []

    def _open(self, opened: Opened, lanes: Iterable[int]) -> None:
        for source in (*opened.sources, *opened.validation):
            _check_tokenizer(source, self._tokenizer)
        self._opened = opened
        self._dealt = [
            DealtSource(source, self._config, self._seed, index) for index, source in enumerate(opened.sources)
        ]
        self._lanes = {lane: Lane(self._dealt, self._config, self._tokenizer, lane, self._seed) for lane in lanes}
        self._states = {lane: self._lanes[lane].initial_state() for lane in self._lanes}

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

    def load_state_dict(self, states: Mapping[str, Any], fingerprint: Mapping[str, Any] | None = None) -> None:
        """Go on where `states` (of any number of ranks and workers, put together) left off.

        Args:
            states: what `state_dict` gave.
            fingerprint: that of the stream that gave it, if it may be of an older version or of files since changed.

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
        if fingerprint is not None:
            self._adopt(fingerprint)
        self._states = {lane: copy.deepcopy(states[str(lane)]) for lane in self._lanes}

    def pass_over(self, places: Mapping[str, list[Any]]) -> None:
        """Leave documents out that come after the batches given so far, as if they were not in the data.

        Args:
            places: By the number of the lane, the places of documents, as in `Batch.document_places`.
        """
        self.close()
        for lane in self._lanes:
            before = self._states[lane].get("passed_over", [])
            new = [place for place in places.get(str(lane), []) if place not in before]
            if new:
                self._states[lane] = {**self._states[lane], "passed_over": [*before, *new]}

    def _adopt(self, fingerprint: Mapping[str, Any]) -> None:
        """Deal out the documents as the stream with this fingerprint did, whatever has changed since."""
        # Without a revision in the recipe, a run stays with the commit it began with.
        began, opened = commits_of(fingerprint), self._opened
        moved = any(began.get((each.dataset, each.revision), each.commit) != each.commit for each in opened.commits)
        if moved or fingerprint.get("order", 1) != opened.order:
            self._open(open_sources(self._config, fingerprint, opened.commits), list(self._lanes))
        for dealt, there in zip(self._dealt, fingerprint.get("sources", ())):
            if len(there.get("sizes", ())) == dealt.source.num_shards:
                dealt.set_shard_sizes(there["sizes"])

    def fingerprint(self) -> dict[str, Any]:
        """Everything that, changed, would change the order of tokens, by the name of its setting; JSON values. See
        `xlstm_lm.data.fingerprint`. The first call reads into all local files."""
        config = self._config
        values = {
            "order": self._opened.order,
            "context_length": config.context_length,
            "global_batch_size": config.global_batch_size,
            "seed": self._seed,
            "shuffle": config.shuffle,
            "shuffle_documents": config.shuffle_documents,
            "tokenizer": self._tokenizer.fingerprint(),
            "sources": [each.identity() | chat_identity(each.source.config, self._tokenizer) for each in self._dealt],
            "validation": [
                each.identity() | chat_identity(each.config, self._tokenizer) for each in self._opened.validation
            ],
        }
        return json.loads(json.dumps(values))

    def differences(self, fingerprint: Mapping[str, Any], states: Mapping[str, Any]) -> list[str]:
        """Why this stream cannot go on from a checkpoint, one line for each setting and file; empty if it can.

        A file that has changed is no reason if all that any lane has read of it is as it was.

        Args:
            fingerprint: that of the stream which gave `states`.
            states: of all lanes.
        """
        self._adopt(fingerprint)
        now = self.fingerprint()

        def rule(index: int, files: list[int]) -> list[str]:
            source = self._dealt[index].source
            read = [number for number in files if not self._as_read(index, number, states)]
            unread = [source.name_of(number) for number in files if number not in read]
            if unread:
                announce_once(
                    f"{some_of(unread, 5)} changed since the checkpoint, in a part that the run had not read yet; it "
                    "goes on with the changed text"
                )
            return [f"changed: {some_of([source.name_of(number) for number in read], 5)}"] if read else []

        lines = fingerprint_differences(fingerprint, now, rule)
        for index, (there, here) in enumerate(zip(fingerprint.get("sources", ()), now["sources"])):
            if there.get("newest") and here.get("newest") and here["newest"] > there["newest"]:
                announce_once(
                    f"{self._config.sources[index].description}: files too large to be compared in full were written "
                    "to since the checkpoint; their sizes and samples of their text are the same"
                )
        for index, (there, here) in enumerate(zip(fingerprint.get("validation", ()), now["validation"])):
            if source_differences(there, here) or changed_files(there, here):
                announce_once(
                    f"data.validation[{index}] holds other documents than before: losses on it before and after do not "
                    "compare"
                )
        return lines

    def _as_read(self, index: int, shard: int, states: Mapping[str, Any]) -> bool:
        """Whether what any lane has read of a shard is in it still."""
        if len(states) != self._config.global_batch_size:
            return False  # the shares of other lanes are unknown
        lanes = [int(lane) for lane in states]
        marks = self._dealt[index].marks(shard, [states[str(lane)]["sources"][index] for lane in lanes], lanes)
        if not marks:
            return marks is not None
        for record in self._dealt[index].source.read([Piece(shard)]):
            if marks.get(record.document + 1, record.checksum) != record.checksum or record.document >= max(marks):
                return False
            marks.pop(record.document + 1, None)
            if not marks:
                return True
        return False

    @property
    def epoch(self) -> int:
        """Number of complete passes over the source that is furthest behind, among all owned lanes."""
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


def _check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer of a run with that of a source of token ids, and with the needs of a source of chats.

    Raises:
        ValueError: they differ; the tokenizer has no chat template.
    """
    chat_template(source.config, tokenizer)
    if source.tokenizer_fingerprint not in (None, tokenizer.fingerprint()):
        raise ValueError(
            f"{source.config.description} was tokenized by another tokenizer than data.tokenizer: set "
            "data.tokenizer as in data.yaml, which xlstm-lm tokenize wrote beside the folder of the ids, or tokenize "
            "the documents again"
        )
