"""One reader for all lanes of a process that share a shard, where there are fewer shards than lanes.

A lane by itself reads the whole shard and keeps the documents at which its turn is. Here the shard is read once, and
each document waits for the lane it belongs to. The documents that a lane gets are the same either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from xlstm_lm.data.sources import Piece, Position, Record, Source
from xlstm_lm.data.sources.readers import Shard

WAITING_SIZE = 2**28
"""Characters or ids of documents of a shard that may wait. Beyond, the lane that is furthest behind reads alone."""


class SharedShard:
    """A shard that is read once for several lanes."""

    def __init__(self, source: Source, shard: int, parts: int, begins: dict[int, Position]) -> None:
        """Prepare to read.

        Args:
            source: The source, whose order of documents is not 1.
            shard: Number of the shard.
            parts: Number of lanes among which its documents are dealt, those of other processes included.
            begins: Position at which each lane of this process begins, by the lane's part.
        """
        self._source, self._shard, self._parts = source, shard, parts
        self._strict = source.config.on_bad_document == "error"  # a bad document then belongs to every lane
        self._begins = begins
        self.is_alone = len(begins) == 1
        """Whether there is only one lane, which the source itself serves better."""
        self._waiting: dict[int, deque[Record]] = {part: deque() for part in begins}
        self._size = 0
        self._records: Iterator[Record] | None = None

    def records(self, part: int) -> Iterator[Record]:
        """The records of one lane's part, from where it begins. Each part is read once."""
        last = self._begins[part]
        waiting = self._waiting.get(part, deque())
        while True:
            while part in self._waiting and not waiting and self._advance():
                pass
            if waiting:
                record = waiting.popleft()
                self._size -= record.size
                last = record.end
                yield record
            elif part in self._waiting:
                return
            else:
                yield from self._source.read([Piece(self._shard, part, self._parts)], last)
                return

    def _advance(self) -> bool:
        """Read one more record and let it wait; returns whether there was one."""
        if self._records is None:
            earliest = min(self._begins.values(), key=lambda begin: begin.document)
            self._records = self._source.read([Piece(self._shard)], earliest)
        record = next(self._records, None)
        if record is None:
            return False
        self._compare(record)
        is_good = record.problem is None and record.size > 0
        turn = record.turn - is_good
        for part in list(self._waiting) if record.problem and self._strict else [turn % self._parts]:
            if part in self._waiting and record.document >= self._begins[part].document:
                self._waiting[part].append(record._replace(piece=self._begins[part].piece))
                self._size += record.size
        if self._size > WAITING_SIZE:
            self._release_the_last()
        return True

    def _compare(self, record: Record) -> None:
        """Compare the file with what the run had read of it where a lane begins.

        Raises:
            ValueError: the file has changed.
        """
        for begin in self._begins.values():
            known = begin.checksum is not None and record.checksum is not None
            if known and begin.document == record.document + 1 and begin.checksum != record.checksum:
                name = self._source.name_of(self._shard)
                raise Shard(0, name, name, Piece(self._shard), begin).changed("documents")

    def _release_the_last(self) -> None:
        """Let the lane for which most text waits read alone from where it is, and forget what waits for it."""
        sizes = {part: sum(record.size for record in waiting) for part, waiting in self._waiting.items()}
        part = max(sizes, key=sizes.__getitem__)
        self._size -= sizes[part]
        self._waiting.pop(part).clear()
