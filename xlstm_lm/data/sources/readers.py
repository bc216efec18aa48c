"""Generators of records, one for each way in which files hold documents."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow.parquet

from xlstm_lm.data.sources.contents import BYTE_ORDER_MARK, READ_ERRORS, Opener, open_parquet, open_text, state_of
from xlstm_lm.data.sources.fields import Fields
from xlstm_lm.data.sources.progress import STEP, Progress
from xlstm_lm.data.sources.record import Piece, Position, Record

ROWS_AT_ONCE = 512
ALL = 2**62
"""Number of the document behind the last one of a file that breaks off: nothing more is to be had of it."""
ONE_A_LINE = "jq -c . FILE writes an object a line, jq -c '.[]' FILE those of an array"


class Shard(NamedTuple):
    """A file to be read."""

    index: int  # type: ignore[assignment]  # tuple.index is never called
    """Position in the list of pieces."""
    path: str
    name: str
    piece: Piece
    first: Position
    """Position to begin at."""
    opener: Opener | None = None
    """Opens the file; None for a file on this machine, at `path`."""
    origin: str = ""
    """Address of the file for messages on damage, with a colon, if `path` is no address."""
    is_fixed: bool = False
    """Whether bytes before a position are not read again and compared, because the file is on another machine."""
    counts_blank_lines: bool = True
    """Whether blank lines have numbers."""

    @property
    def file(self) -> str | Opener:
        """The file for `open_file`."""
        return self.opener or self.path

    def changed(self, units: str) -> ValueError:
        """The error of a file that is no longer what the run has read of it; `units` are its lines or rows."""
        return ValueError(
            f"data file {self.path} has changed in its first {self.first.document} {units}, which this run has read "
            "already: put it back as it was, or choose another training.run_dir for a new run"
        )


def read_whole_files(shards: list[Shard], fields: None, order: int, strict: bool) -> Iterator[Record]:
    """Records of files that are one document each; a part is that part of the characters."""
    del fields, strict  # there is one text, and every lane meets its part of a bad file
    errors = READ_ERRORS  # at exit, globals are gone before generators are closed
    for shard in shards:
        index, path, name, piece = shard.index, shard.path, shard.name, shard.piece
        if shard.first.document > 0:
            continue
        record = Record(index, 0, "", name)
        try:
            with open_text(shard.file) as file:
                content = file.read()
            text = (content if order == 1 else content.removeprefix(BYTE_ORDER_MARK)).decode()
            record = record._replace(checksum=zlib.crc32(content))
            if piece.parts > 1:
                cuts = [len(text) * part // piece.parts for part in (piece.part, piece.part + 1)]
                text = text[cuts[0] : cuts[1]]
                record = record._replace(id=f"{name}[{piece.part + 1}/{piece.parts}]")
            record = record._replace(text=text, turn=1)
            if not text and piece.parts == 1:
                record = record._replace(problem=f"data file {path} is empty")
        except UnicodeDecodeError as error:
            record = record._replace(problem=f"data file {path} is not UTF-8 (byte {error.start}: {error.reason})")
        except errors as error:
            record = record._replace(problem=f"data file {path} cannot be read ({error})")
        yield record


class Turns:
    """Shares the documents of a shard among the lanes that read it."""

    def __init__(self, shard: Shard, order: int, strict: bool) -> None:
        """Begin at the shard's `first`; `strict`: a bad document is everybody's."""
        self._shard, self._order, self._strict = shard, order, strict
        self.turn = shard.first.turn

    def is_mine(self, number: int) -> bool:
        """Whether line or row `number`, the next one, is this lane's if it is good."""
        turn = number if self._order == 1 else self.turn
        return turn % self._shard.piece.parts == self._shard.piece.part

    def record(
        self,
        number: int,
        text: str,
        problem: str | None,
        unit: str,
        read: Progress | int | None,
    ) -> Record | None:
        """The record of line or row `number`, None if it is another lane's. An empty text uses up no turn.

        Args:
            number: Number of the line or row within the shard, from 0.
            text: Text of the document; empty if there is a problem.
            problem: The problem with it; None if there is none.
            unit: "line", "row" or "document", for messages.
            read: Progress in the shard up to the end of this document, or the checksum of all that; None if unknown.
        """
        mine = self.is_mine(number)
        if problem is None and text:
            self.turn += 1
        if not mine and not (problem and self._strict):
            return None
        shard = self._shard
        problem = None if problem is None else f"data file {shard.path}, {unit} {number + 1}: {problem}"
        name = f"{shard.name}:{number + 1}"
        if not isinstance(read, Progress):
            return Record(shard.index, number, text, name, problem, self.turn, read)
        place = (read.checksum, read.offset, read.landmark)
        return Record(shard.index, number, text, name, problem, self.turn, *place)

    def broken_off(self, number: int, error: Exception, unit: str) -> Record | None:
        """The record of a file that cannot be read from line or row `number` on; None if it is another lane's."""
        if not self._strict and not self.is_mine(number):
            return None
        shard = self._shard
        after = f" after {unit} {number}" if number else ""
        problem = f"data file {shard.path} cannot be read{after} ({shard.origin}{error})"
        return Record(shard.index, ALL - 1, "", shard.name, problem, self.turn, None)


def read_lines(shards: list[Shard], fields: Fields | None, order: int, strict: bool) -> Iterator[Record]:
    """Records of files with a document a line, plain or (with `fields`) a JSON object.

    Raises:
        ValueError: lines before the first one wanted, which the run has read before, have changed.
    """
    errors = READ_ERRORS
    for shard in shards:
        if shard.first.document == ALL:
            continue
        turns = Turns(shard, order, strict)
        count = 0
        try:
            with open_text(shard.file) as file:
                count, progress = _pass_over(file, shard)
                for line in file:
                    progress.add(line)
                    if not shard.counts_blank_lines and not line.strip():
                        continue
                    number, count = count, count + 1
                    if order > 1 and (number == 0 or fields is not None):  # also where such files were joined
                        line = line.removeprefix(BYTE_ORDER_MARK)
                    if not line.strip() or (order == 1 and not turns.is_mine(number)):
                        continue
                    text, problem = _parse_line(line, fields)
                    if record := turns.record(number, text, problem, "line", progress):
                        yield record
        except errors as error:
            if record := turns.broken_off(count, error, "line"):
                yield record


def _pass_over(file: IO[bytes], shard: Shard) -> tuple[int, Progress]:
    """Move a file of lines to the position to begin at; returns the lines before it, and the progress there.

    A file that may have changed is compared with what the run had read: from the landmark on if its size and time of
    change are the same as then, otherwise from its beginning. The lines are counted only where a checkpoint of an older
    version does not hold the offset.
    """
    first, count = shard.first, 0
    if shard.is_fixed and first.offset is not None and file.seekable():
        return first.document, Progress(file.seek(first.offset), None)
    state = None if shard.is_fixed else state_of(file)
    progress = Progress(0, None if shard.is_fixed else 0, state)
    if (landmark := first.landmark) is not None and state == (landmark.size, landmark.changed):
        progress = Progress(file.seek(landmark.offset), landmark.checksum, state)
    if first.offset is None:
        while count < first.document and (line := file.readline()):
            progress.add(line)
            count += shard.counts_blank_lines or bool(line.strip())
    else:
        while left := first.offset - progress.offset:
            part = file.read(min(STEP, left))
            if not part:
                break
            progress.add(part)
        count = first.document if progress.offset == first.offset else -1
    differs = not shard.is_fixed and first.checksum not in (None, progress.checksum)
    if differs or count < first.document:
        raise shard.changed("lines")
    return count, progress


def read_rows(shards: list[Shard], fields: Fields, order: int, strict: bool) -> Iterator[Record]:
    """Records of parquet files; of their columns only `fields` are read."""
    errors = READ_ERRORS
    for shard in shards:
        if shard.first.document == ALL:
            continue
        turns = Turns(shard, order, strict)
        number, checksum = shard.first.document, shard.first.checksum
        try:
            for values in _columns(shard.file, fields.names, number):
                text, problem = fields.text(dict(zip(fields.names, values)))
                if checksum is not None:
                    kept = values[0] if len(values) == 1 else values
                    checksum = zlib.crc32(repr(kept).encode("utf-8", "surrogatepass"), checksum)
                if record := turns.record(number, text, problem, "row", checksum):
                    yield record
                number += 1
        except errors as error:
            if record := turns.broken_off(number, error, "row"):
                yield record


def _columns(path: str | Opener, names: tuple[str, ...], first_row: int) -> Iterator[tuple[Any, ...]]:
    """The values of columns, row by row from a row on; bytes where a text is not UTF-8."""
    with open_parquet(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        groups: list[int] = []
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not groups and first_row >= rows:
                first_row -= rows
            elif rows:
                groups.append(group)
        if not groups:
            return
        there = file.schema_arrow.names
        if unfit := next((name for name in names if there.count(name) != 1), None):
            how = "no column" if unfit not in there else "more than one column"
            raise OSError(f"{how} {unfit!r} among {', '.join(there)}; the setting is text_field")
        for group in groups:  # one at a time: rows before damage are good
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=list(names)):
                columns = [batch.column(batch.schema.get_field_index(name))[first_row:] for name in names]
                first_row = max(first_row - batch.num_rows, 0)
                yield from zip(*(map(_value, column) for column in columns))


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _parse_line(line: bytes, fields: Fields | None) -> tuple[str, str | None]:
    """The text of a line, or what is wrong with it."""
    if fields is not None:
        return parse_json(line, fields)
    try:
        return line.decode().rstrip("\r\n"), None
    except UnicodeDecodeError as error:
        return "", _not_utf8(error)


def parse_json(line: bytes, fields: Fields) -> tuple[str, str | None]:
    """The text in a line of JSON, or what is wrong with it."""
    try:
        value = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        return "", _not_utf8(error)
    except json.JSONDecodeError as error:
        if line.strip() in (b"[", b"{"):
            return "", f"JSON over several lines: {ONE_A_LINE}"
        return "", f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "", "JSON that is nested too deep to be read"
    except ValueError as error:  # a number with more digits than Python reads
        return "", f"JSON that cannot be read ({error})"
    if not isinstance(value, dict):
        remedy = f": {ONE_A_LINE}" if isinstance(value, list) else ""
        return "", f"a JSON object with a field {fields.names[0]!r} is wanted, not {type(value).__name__}{remedy}"
    return fields.text(value)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start} of the line: {error.reason})"
