"""Restarts on local files of lines seek to their position, and name a file that is not as it was."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_going_on import checkpoint, go_on, lines_of, stream_of, tokens
from xlstm_lm.data.sources import Piece, Position, open_source, readers
from xlstm_lm.data.sources.progress import STEP, Progress

LINES = 12_000
"""Lines of about 500 bytes each, 6 MB."""


def write_lines(path: Path, kind: str, compress: bool = False) -> None:
    lines = [f"line {number}: " + "word " * 100 for number in range(LINES)]
    text = "".join((line if kind == "text_lines" else json.dumps({"text": line})) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), 1) if compress else text.encode())


class CountedFile(io.FileIO):
    """A file that counts the bytes read of all such files."""

    count = 0

    def readinto(self, buffer) -> int:
        got = super().readinto(buffer)
        CountedFile.count += got
        return got


@pytest.fixture
def counted(monkeypatch) -> type[CountedFile]:
    """Counter of the bytes that readers of lines read from files."""
    opened = readers.open_text

    def open_counted(path):
        file = opened(path)
        if not isinstance(getattr(file, "raw", None), io.FileIO):
            return file
        file.close()
        return io.BufferedReader(CountedFile(path), buffer_size=2**14)

    monkeypatch.setattr(readers, "open_text", open_counted)
    CountedFile.count = 0
    return CountedFile


def read_from(path: Path, kind: str, end: Position | None = None):
    return open_source(lines_of(path, kind)).read([Piece(0)], *([] if end is None else [end]))


def position_at(path: Path, kind: str, document: int) -> Position:
    return next(record for record in read_from(path, kind) if record.document == document).end


@pytest.mark.parametrize("kind", ["text_lines", "jsonl"])
def test_a_restart_reads_no_more_than_two_steps_again(kind, tmp_path, counted):
    path = tmp_path / "data"
    write_lines(path, kind)
    records = list(read_from(path, kind))
    for number in (0, 1500, 3500, 11_000, LINES - 1):
        counted.count = 0
        again = read_from(path, kind, records[number].end)
        expected = records[number + 1 : number + 20]
        assert [next(again) for _ in expected] == expected  # with checksums and landmarks, as by a reader of it all
        again.close()
        assert counted.count <= 2 * STEP + 50_000
        assert number < 4500 or counted.count < records[number].offset / 2


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_continue_without_reading_all_before(lanes, tmp_path, counted):
    path = tmp_path / "data"
    write_lines(path, "jsonl")
    settings = {"lanes": lanes, "context_length": 16384, "shuffle_documents": 50}
    stream = stream_of(lines_of(path, "jsonl"), **settings)
    tokens(stream, 240 // lanes)
    saved = checkpoint(stream)
    expected, after = tokens(stream, 6), checkpoint(stream)
    again = go_on(stream_of(lines_of(path, "jsonl"), **settings), saved)
    counted.count = 0
    assert tokens(again, 6) == expected and checkpoint(again) == after
    furthest = max(state["sources"][0]["offset"] for state in saved[1].values())
    assert furthest > 3.5 * STEP and counted.count < 2.6 * STEP


def same_size(path: Path, at: int, *, restore_time: bool) -> None:
    """Replace a byte of a file, and set back its time of change if wanted."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 3
    path.write_bytes(content)
    changed = before.st_mtime_ns if restore_time else before.st_mtime_ns + 10**9
    os.utime(path, ns=(changed, changed))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("restore_time", [True, False])
@pytest.mark.parametrize("kind", ["text_lines", "jsonl"])
def test_other_text_just_before_the_position_is_named(kind, restore_time, tmp_path):
    path = tmp_path / "data"
    write_lines(path, kind)
    end = position_at(path, kind, 10_000)
    same_size(path, end.offset - 100, restore_time=restore_time)
    with pytest.raises(ValueError, match=f"data file {path} has changed in its first 10001 lines"):
        next(read_from(path, kind, end))


def test_other_text_far_before_the_position_is_named_by_time_or_content(tmp_path):
    path = tmp_path / "data"
    write_lines(path, "text_lines")
    stream = stream_of(lines_of(path), lanes=1, context_length=16384)
    tokens(stream, 240)
    saved = checkpoint(stream)
    end = position_at(path, "text_lines", 10_000)
    same_size(path, 50, restore_time=False)
    with pytest.raises(ValueError, match=f"data file {path} has changed in its first 10001 lines"):
        next(read_from(path, "text_lines", end))
    os.utime(path, ns=(end.landmark.changed, end.landmark.changed))  # as no editor does
    assert next(read_from(path, "text_lines", end)).document == 10_001
    assert stream_of(lines_of(path), lanes=1, context_length=16384).differences(*saved) == [
        f"  sources[0]: changed: {path}"
    ]


@pytest.mark.parametrize("change", ["touched", "longer", "older checkpoint", "compressed"])
def test_what_cannot_be_compared_in_part_is_compared_whole_and_continues(change, tmp_path, counted):
    path = tmp_path / "data"
    write_lines(path, "jsonl", compress=change == "compressed")
    end = position_at(path, "jsonl", 10_000)
    assert (end.landmark is None) == (change == "compressed")
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "longer":
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
    elif change == "older checkpoint":
        end = end._replace(landmark=None)
    counted.count = 0
    again = read_from(path, "jsonl", end)
    assert next(again).text.startswith("line 10001: ")
    again.close()
    assert change == "compressed" or counted.count >= end.offset
    with pytest.raises(ValueError, match="has changed in its first 10001 lines"):
        next(read_from(path, "jsonl", end._replace(checksum=1, landmark=None)))


@given(st.lists(st.integers(0, 2 * STEP + 3), max_size=6))
def test_progress_does_not_depend_on_how_the_bytes_are_divided(lengths):
    content = (b"0123456789abcde" * (STEP // 4))[: sum(lengths)]
    parts, at = [], 0
    for length in lengths:
        parts.append(content[at : at + length])
        at += length
    progress = Progress(state=(1, 2))
    for part in parts:
        progress.add(part)
    content = content[:at]
    assert (progress.offset, progress.checksum) == (len(content), zlib.crc32(content))
    place = max(len(content) // STEP - 1, 0) * STEP
    assert progress.landmark == (1, 2, place, zlib.crc32(content[:place]))
    again = Progress(place, progress.landmark.checksum, (1, 2))
    again.add(content[place:])
    assert (again.offset, again.checksum, again.landmark) == (progress.offset, progress.checksum, progress.landmark)
