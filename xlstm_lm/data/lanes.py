"""A lane: one endless, deterministic stream of packed rows, whatever the number of ranks or workers.

Each source's shards are put in a new order every epoch and dealt out to all the lanes; a lane reads its share, shuffles
it in blocks of documents, and draws from the sources by tokens. Its whole position is a small JSON value. Nothing of
the shuffle is stored: a block is read again from where it begins and put in the same order, as orders come from hashes.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.errors import some_of
from xlstm_lm.data.config import DataConfig
from xlstm_lm.data.documents import Read, documents, tokenized
from xlstm_lm.data.packing import Document, Row, pack
from xlstm_lm.data.shared_shards import SharedShard
from xlstm_lm.data.sources import KINDS, START, Landmark, Piece, Position, Record, Source
from xlstm_lm.data.tokenizer import Tokenizer

UNKNOWN = {"turn": 0, "checksum": None, "offset": None, "landmark": None, "read": None}
"""Fields that the state of a lane lacks in older checkpoints, which a lane does not need to go on."""


def hashed_order(count: int, *key: object) -> list[int]:
    """A permutation of range(count) that depends on `key` alone: not on a library's random numbers or its version."""
    prefix = "/".join(map(str, key))
    return sorted(range(count), key=lambda index: _hash(f"{prefix}/{index}"))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _position(state: Mapping[str, Any]) -> Position:
    """The position at which a lane's next block begins."""
    position = Position(*({**UNKNOWN, **state}[name] for name in Position._fields))
    return position._replace(landmark=position.landmark and Landmark(*position.landmark))


def _state_at(position: Position) -> dict[str, Any]:
    """A position as JSON, as it stands in the state of a lane."""
    return {**position._asdict(), "landmark": position.landmark and list(position.landmark)}


class DealtSource:
    """A source whose shards are dealt to lanes, differently in each epoch."""

    def __init__(self, source: Source, config: DataConfig, seed: int, index: int) -> None:
        self.source = source
        self._lanes = config.global_batch_size
        self._shuffle = config.shuffle
        # The order of files is shuffled anyway: blocks would add nothing where a file is one document.
        whole_files = KINDS[source.config.kind].one_document_a_file
        self._block_documents = config.shuffle_documents if config.shuffle and not whole_files else 1
        self._key = (seed, index)
        self._dealt: dict[int, list[list[Piece]]] = {}
        self._begins: dict[int, tuple[int, Position]] = {}
        """Epoch and position at which the lanes of this process begin; empty if they do not share readers."""
        self._shared: dict[tuple[int, int], SharedShard] = {}
        """Readers in use, by epoch and shard."""

    def announce_sharing(self) -> None:
        """Say so if there are fewer shards than lanes, which costs reading."""
        if self.source.num_shards >= self._lanes:
            return
        how = (
            "each file is cut in pieces, one a lane, so documents are shorter than the files"
            if KINDS[self.source.config.kind].one_document_a_file
            else "several lanes read the same file and take turns with its documents; more, smaller files read faster"
        )
        announce_once(
            f"{self.source.config.description}: {self.source.num_shards} files for {self._lanes} lanes "
            f"(global_batch_size): {how}"
        )

    @property
    def weight(self) -> float:
        """Share of the training tokens, relative to those of the other sources."""
        config = self.source.config
        return config.weight * (self.source.num_tokens or 1) if config.weight_by == "epochs" else config.weight

    def identity(self) -> dict[str, Any]:
        """Identity of the documents and of their place in the mixture, as JSON; see `xlstm_lm.data.fingerprint`."""
        limit = self.source.config.max_tokens
        mixed = {"weight": self.weight} | ({} if limit is None else {"max_tokens": limit})
        return self.source.identity() | mixed

    def share_readers(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Let the lanes of this process, each of which goes on from its state, read shards together."""
        self._shared.clear()
        one_a_file = KINDS[self.source.config.kind].one_document_a_file
        shared = self.source.num_shards < self._lanes and not one_a_file and self.source.order > 1
        self._begins = {lane: (state["epoch"], _position(state)) for lane, state in states.items()} if shared else {}

    def _reader(self, lane: int, epoch: int) -> Read:
        """The function by which a lane reads in an epoch: the source's, or one that shares its reader."""
        if lane not in self._begins:
            return self.source.read
        (piece,) = self.deal(epoch)[lane]
        key = epoch, piece.shard
        if key not in self._shared:
            begins = {}
            for other, (first_epoch, position) in self._begins.items():
                (share,) = self.deal(epoch)[other]
                if share.shard == piece.shard and first_epoch <= epoch:
                    begins[share.part] = position if first_epoch == epoch else START
            for old in [each for each in self._shared if each[0] < epoch - 1]:
                del self._shared[old]
            self._shared[key] = SharedShard(self.source, piece.shard, piece.parts, begins)
        shared = self._shared[key]
        if shared.is_alone:
            return self.source.read
        return lambda pieces, first: shared.records(piece.part)

    def set_shard_sizes(self, sizes: list[int]) -> None:
        """Deal by these sizes from now on, those of the files when the run began."""
        self.source.shard_sizes = sizes
        self._dealt.clear()

    def deal(self, epoch: int) -> list[list[Piece]]:
        """The pieces of each lane in `epoch`: together, every document exactly once."""
        if epoch not in self._dealt:
            # Lanes are at most about an epoch apart.
            if len(self._dealt) > 2:
                del self._dealt[min(self._dealt)]
            self._dealt[epoch] = self._deal(epoch)
        return self._dealt[epoch]

    def _deal(self, epoch: int) -> list[list[Piece]]:
        count = self.source.num_shards
        order = hashed_order(count, "shards", *self._key, epoch) if self._shuffle else list(range(count))
        if count < self._lanes:
            parts = [len(range(shard, self._lanes, count)) for shard in range(count)]
            return [[Piece(order[lane % count], lane // count, parts[lane % count])] for lane in range(self._lanes)]
        # Each shard goes to the lane with the least so far: lanes finish an epoch at about the same time.
        pieces: list[list[Piece]] = [[] for _ in range(self._lanes)]
        loads = [(0, 0, lane) for lane in range(self._lanes)]
        for shard in order:
            size, dealt, lane = heapq.heappop(loads)
            pieces[lane].append(Piece(shard))
            heapq.heappush(loads, (size + self.source.shard_sizes[shard], dealt + 1, lane))
        return pieces

    def initial_state(self) -> dict[str, Any]:
        """The state of a lane that has read nothing: the block that comes next, how much of it was used, and how far
        documents were read (epoch, piece, document and checksum; None where an older checkpoint lacks it)."""
        return {"epoch": 0, **_state_at(START), "index": 0, "skipped": 0, "read": [0, 0, 0, 0]}

    def documents(
        self, lane: int, state: dict[str, Any], tokenizer: Tokenizer
    ) -> Iterator[tuple[Record, dict[str, Any]]]:
        """Documents of `lane` without end, each with the state after it; all can be encoded by `tokenizer`.

        Raises:
            ValueError: a bad document, or no document for this lane.
        """
        state = {**UNKNOWN, **state}
        while True:
            pieces = self.deal(state["epoch"])[lane]
            bad: list[Record] = []
            reader = self._reader(lane, state["epoch"])
            records = documents(self.source, tokenizer, pieces, _position(state), bad, reader)
            given = state["piece"] > 0 or state["document"] > 0
            while True:
                block, end = self._read_block(records)
                key = (*self._key, lane, state["epoch"], state["piece"], state["document"])
                order = hashed_order(len(block), "block", *key) if self._shuffle else range(len(block))
                read = [state["epoch"], *((end.piece, end.document, end.checksum) if end else (len(pieces), 0, 0))]
                for index in islice(order, state["index"], None):
                    state = {**state, "index": state["index"] + 1, "read": read}
                    yield block[index], state
                given = given or bool(block)
                state = {**state, "index": 0, "skipped": state["skipped"] + len(bad)}
                bad.clear()
                if end is None:
                    break
                state |= _state_at(end)
            if not given:
                note = f" ({state['skipped']} bad ones skipped)" if state["skipped"] else ""
                names = some_of([self.source.name_of(piece.shard) for piece in pieces], 3)
                raise ValueError(
                    f"{self.source.config.description} has no document for lane {lane}, one of the {self._lanes} of "
                    f"global_batch_size: its share of {names} is empty{note}; use a smaller global_batch_size or "
                    "more text, and remove files without documents"
                )
            state = {**state, "epoch": state["epoch"] + 1, **_state_at(START)}

    def _read_block(self, records: Iterator[Record]) -> tuple[list[Record], Position | None]:
        """Read the next block; returns its documents and its end, None at that of the epoch."""
        block: list[Record] = []
        for record in (record for record in records if record.size):
            block.append(record)
            if len(block) == self._block_documents:
                return block, record.end
        return block, None

    def marks(self, shard: int, states: Iterable[dict[str, Any]], lanes: Iterable[int]) -> dict[int, int] | None:
        """Positions in a shard up to which the given lanes have read, each at its state of this source.

        Returns:
            the checksum at each number of documents after which a lane has stopped; empty if no lane has begun with the
            shard, None if one has read it to its end, or if an older checkpoint does not tell.
        """
        read = {lane: state.get("read") or (1, 0, 0, None) for lane, state in zip(lanes, states)}
        marks = {}
        for epoch in range(max(place[0] for place in read.values()) + 1):
            for lane, (last_epoch, last_piece, document, checksum) in read.items():
                for index, piece in enumerate(self.deal(epoch)[lane]):
                    if piece.shard != shard or (epoch, index) > (last_epoch, last_piece):
                        continue
                    if (epoch, index) < (last_epoch, last_piece) or checksum is None:
                        return None
                    if document > 0:
                        marks[document] = checksum
        return marks


def share_readers(lanes: list[Lane], states: list[dict[str, Any]]) -> None:
    """Let lanes that are read in one process, each from its state on, read the shards that they share together."""
    for index, source in enumerate(lanes[0].sources if lanes else ()):
        source.share_readers({lane.number: state["sources"][index] for lane, state in zip(lanes, states)})


class Lane:
    """One lane over a mixture of sources."""

    def __init__(self, sources: list[DealtSource], config: DataConfig, tokenizer: Tokenizer, lane: int, seed: int):
        self.sources = sources
        self._config = config
        self._tokenizer = tokenizer
        self.number = lane
        self._seed = seed

    def initial_state(self) -> dict[str, Any]:
        """The state of a lane that has given no row."""
        # A head start of up to a row, different in every lane: or all of them would begin with the same source.
        shares = [
            int.from_bytes(_hash(f"head start/{self._seed}/{self.number}/{index}")) / 2**64
            for index in range(len(self.sources))
        ]
        return {
            "sources": [source.initial_state() for source in self.sources],
            "tokens": [int(share * self._config.context_length) for share in shares],
            "offset": 0,
        }

    def _limits(self) -> list[float]:
        """Counts of tokens of each source at which this lane reads no more of it, the head start included."""
        limits = [source.source.config.max_tokens for source in self.sources]
        lanes = self._config.global_batch_size
        return [
            math.inf if limit is None else limit / lanes + head_start
            for limit, head_start in zip(limits, self.initial_state()["tokens"])
        ]

    def rows(self, state: dict[str, Any]) -> Iterator[Row]:
        """Packed rows without end, each with the state after it; `state` says where to begin.

        Documents whose places are in the state's list `passed_over` are left out, as if they were not in the data. An
        entry stays in the list until its document has come by.
        """
        documents, offset = self._documents(state), state["offset"]
        if state.get("passed_over"):
            first = next(documents)
            assert first.state is not None
            # The document of which an earlier row has used a part may be left out itself.
            offset = offset if first.state.get("passed_over") == state["passed_over"] else 0
            documents = chain([first], documents)
        return pack(documents, self._config.context_length, self._tokenizer.end_of_document, offset)

    def _documents(self, state: dict[str, Any]) -> Iterator[Document]:
        weights = [source.weight for source in self.sources]
        limits = self._limits()
        states, tokens, passed_over = state["sources"], state["tokens"], state.get("passed_over", [])
        streams = [source.documents(self.number, begin, self._tokenizer) for source, begin in zip(self.sources, states)]
        while True:
            left = [index for index, limit in enumerate(limits) if tokens[index] < limit]
            if not left:
                raise ValueError(
                    f"lane {self.number} has read max_tokens of all data.sources: raise max_tokens, or leave it out "
                    "for one source"
                )
            chosen = min(left, key=lambda index: tokens[index] / weights[index])
            record, after = next(streams[chosen])
            place = [chosen, *(after[name] for name in ("epoch", "piece", "document", "index"))]
            if place in passed_over:
                passed_over = [each for each in passed_over if each != place]
                states = [after if index == chosen else one for index, one in enumerate(states)]
                continue
            # A row that begins in the document has read all of its block.
            begin = [{**one, "read": after["read"]} if index == chosen else one for index, one in enumerate(states)]
            now = {"sources": begin, "tokens": tokens} | ({"passed_over": passed_over} if passed_over else {})
            document = tokenized(record, self._tokenizer, now, place)
            yield document  # until all of its tokens have been taken
            states = [after if index == chosen else one for index, one in enumerate(states)]
            length = document.num_tokens + 1
            tokens = [count + length * (index == chosen) for index, count in enumerate(tokens)]
