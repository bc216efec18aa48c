"""Going on from a checkpoint: on the same documents in the same order, or not at all, with the file named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xlstm_lm.data import DataConfig, SourceConfig, TrainingStream, build_tokenizer, open_source
from xlstm_lm.data.sources import Piece

LANES = 3


def stream_of(*sources: SourceConfig, lanes: int = LANES, **settings) -> TrainingStream:
    values = {"context_length": 16, "global_batch_size": lanes, "shuffle_documents": 5, "num_workers": 0} | settings
    config = DataConfig(sources=list(sources), **values)
    return TrainingStream(config, build_tokenizer(config.tokenizer), lanes=range(lanes), seed=1)


def tokens(stream: TrainingStream, batches: int) -> list[Any]:
    return [stream.next_batch().tokens_BT.tolist() for _ in range(batches)]


def checkpoint(stream: TrainingStream) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads(json.dumps([stream.fingerprint(), stream.state_dict()]))


def go_on(stream: TrainingStream, saved: tuple[dict[str, Any], dict[str, Any]]) -> TrainingStream:
    fingerprint, states = saved
    assert stream.differences(fingerprint, states) == []
    stream.load_state_dict(states, fingerprint)
    return stream


def write_lines(path: Path, count: int = 60, kind: str = "text_lines") -> list[str]:
    lines = [f"line {number} of {path.name}" for number in range(count)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": lines}), path, row_group_size=20)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        path.write_text("".join(line + "\n" for line in lines))
    return lines


def lines_of(path: Path, kind: str = "text_lines", **settings) -> SourceConfig:
    return SourceConfig(kind=kind, paths=[str(path)], **settings)


@pytest.mark.parametrize("kind", ["text_lines", "jsonl", "empty", "bad", "parquet"])
@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_lanes_take_turns_by_documents(kind, lanes, tmp_path):
    """Every other line, or three of four, is no document: 8 documents are enough for 8 lanes, and each is read once."""
    documents = [f"{number}" for number in range(8)]
    path = tmp_path / "data"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [text for document in documents for text in (document, "", None)]}), path)
    else:
        between = {"text_lines": "\n \n", "jsonl": "\n\n\n", "empty": '{"text": ""}\n', "bad": "{bad\n[]\n{}\n"}[kind]
        written = documents if kind == "text_lines" else [json.dumps({"text": text}) for text in documents]
        path.write_text("".join(line + "\n" + between for line in written))
    source = SourceConfig(
        kind=kind if kind in ("text_lines", "parquet") else "jsonl", paths=[str(path)], on_bad_document="skip"
    )
    stream = stream_of(source, lanes=lanes, context_length=16 // lanes, shuffle=False)
    (batch,) = tokens(stream, 1)
    read = ["".join(chr(token) for token in row if token != 256) for row in batch]
    assert read == ["".join(documents[lane::lanes]) for lane in range(lanes)]
    # Each bad document comes to one of the lanes.
    parts = [open_source(source).read([Piece(0, lane, lanes)]) for lane in range(lanes)]
    bad = [record.id for part in parts for record in part if record.problem]
    assert len(bad) == len(set(bad)) == {"bad": 24, "parquet": 8}.get(kind, 0)


def test_an_order_begun_by_lines_goes_on_by_lines(tmp_path):
    """State, fingerprint and rows as the program gave them before lanes took turns by documents."""
    path = tmp_path / "old.txt"
    text = "".join(f"line {n} " + "x" * (n * 7 % 23) + "\n" * (1 + n * n % 11 % 3) for n in range(60))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    positions = [(16, 2, 147, 6), (26, 1, 142, 4), (21, 2, 133, 14)]
    states = {
        str(lane): {
            "sources": [{"epoch": 0, "piece": 0, "document": document, "index": index, "skipped": 0}],
            "tokens": [count],
            "offset": offset,
        }
        for lane, (document, index, count, offset) in enumerate(positions)
    }
    fingerprint = {
        "context_length": 16,
        "global_batch_size": 3,
        "seed": 1,
        "shuffle": True,
        "shuffle_documents": 5,
        "tokenizer": "bytes",
        "sources": [{"kind": "text_lines", "files": 1, "digest": "8def85bd43412ac0", "weight": 1.0}],
    }
    stream = go_on(stream_of(lines_of(path)), (fingerprint, states))
    given = hashlib.sha256()
    for _ in range(60):
        given.update(stream.next_batch().tokens_BT.numpy().tobytes())
    stream = go_on(stream_of(lines_of(path)), checkpoint(stream))
    for _ in range(60):
        given.update(stream.next_batch().tokens_BT.numpy().tobytes())
    assert given.hexdigest() == "e8eb49dd94af50ecb8a26c8940d612f46b92ea9ea4ece93573fb94c61807fbe1"
    assert stream.epoch == 5
    path.write_text("another size")
    different = stream_of(lines_of(path)).differences(fingerprint, states)
    assert different == ["  sources[0].digest: names or sizes of the files are others"]


@pytest.mark.parametrize("kind", ["text", "text_lines", "jsonl", "parquet"])
def test_other_text_of_the_same_size_is_refused_by_name(kind, tmp_path):
    for number in range(5):
        write_lines(tmp_path / f"{number}", kind=kind)
    source = SourceConfig(kind=kind, paths=[str(tmp_path / "*")])
    stream = stream_of(source)
    tokens(stream, 8 if kind == "text" else 200)
    saved = checkpoint(stream)
    path = tmp_path / "3"
    size = path.stat().st_size
    if kind == "parquet":
        rows = [f"word {number} of {path.name}" for number in range(60)]
        pq.write_table(pa.table({"text": rows}), path, row_group_size=20)
    else:
        path.write_text(path.read_text().replace("line", "word"))
    assert path.stat().st_size == size
    states = saved[1]
    states["0"]["sources"][0]["read"] = [1, 0, 0, 0]  # whatever the lanes' share: all of it has been read
    assert stream_of(source).differences(*saved) == [f"  sources[0]: changed: {path}"]


def test_data_that_moved_and_settings_of_no_account_change_nothing(tmp_path):
    for folder in ("here/a", "here/b"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(2):
            write_lines(tmp_path / folder / f"{number}.txt")
    stream = stream_of(SourceConfig(kind="text_lines", paths=[str(tmp_path / "here" / "*" / "*.txt")]))
    tokens(stream, 20)
    saved = checkpoint(stream)
    expected = tokens(stream, 20)
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    (tmp_path / "there").symlink_to(tmp_path / "copy")
    shutil.rmtree(tmp_path / "here")
    moved = SourceConfig(
        kind="text_lines",
        paths=[str(tmp_path / "there" / "a" / "*"), str(tmp_path / "there" / "b" / "?.txt")],
        retry_seconds=1.0,
        on_bad_document="skip",
        weight=3.0,
    )
    assert tokens(go_on(stream_of(moved), saved), 20) == expected
    assert stream_of(moved, shuffle=False).differences(*saved) == ["  shuffle: True there, False now"]
    (tmp_path / "there" / "b" / "2.txt").write_text("more")
    assert stream_of(moved).differences(*saved) == ["  sources[0].files: 4 there, 5 now"]


def test_weights_count_as_shares(tmp_path):
    for name in "ab":
        write_lines(tmp_path / name)
    sources = [lines_of(tmp_path / "a", weight=1.0), lines_of(tmp_path / "b", weight=3.0)]
    stream = stream_of(*sources)
    saved = checkpoint(stream)
    assert not stream_of(lines_of(tmp_path / "a", weight=2.0), lines_of(tmp_path / "b", weight=6.0)).differences(*saved)
    different = stream_of(lines_of(tmp_path / "a"), lines_of(tmp_path / "b")).differences(*saved)
    assert different[0] == "  sources[0].share: 0.25 there, 0.5 now" and len(different) == 2


@pytest.mark.parametrize("kind", ["text_lines", "jsonl", "parquet"])
def test_a_change_behind_what_was_read_goes_on_and_is_said(kind, tmp_path, caplog):
    path = tmp_path / "data"
    lines = write_lines(path, kind=kind)
    stream = stream_of(lines_of(path, kind))
    tokens(stream, 5)
    saved = checkpoint(stream)
    furthest = max(state["sources"][0]["read"][2] for state in saved[1].values())
    assert 0 < furthest < 50

    def write(number: int, text: str) -> None:
        now = [*lines[:number], text, *lines[number + 1 :]]
        if kind == "parquet":
            pq.write_table(pa.table({"text": now}), path, row_group_size=20)
        else:
            path.write_text(
                "".join((line if kind == "text_lines" else json.dumps({"text": line})) + "\n" for line in now)
            )

    write(furthest, "another text")
    again = go_on(stream_of(lines_of(path, kind)), saved)
    assert f"{path} changed since the checkpoint, in a part that the run had not read yet" in caplog.text
    whole = stream_of(lines_of(path, kind))
    assert tokens(whole, 25)[5:] == tokens(again, 20)
    assert again.fingerprint()["sources"][0]["contents"] == whole.fingerprint()["sources"][0]["contents"]
    write(furthest - 1, "another text")
    assert stream_of(lines_of(path, kind)).differences(*saved) == [f"  sources[0]: changed: {path}"]


@pytest.mark.parametrize("lanes", [1, LANES])
def test_nothing_in_a_file_that_was_read_to_its_end_may_change(lanes, tmp_path):
    path = tmp_path / "data"
    write_lines(path)
    stream = stream_of(lines_of(path), lanes=lanes)
    while stream.epoch < 1:
        stream.next_batch()
    saved = checkpoint(stream)
    assert all(state["sources"][0]["read"][2] < 50 for state in saved[1].values())  # now in the second pass
    path.write_text(path.read_text().replace("line 59 ", "word 59 "))
    assert stream_of(lines_of(path), lanes=lanes).differences(*saved) == [f"  sources[0]: changed: {path}"]


def test_lines_that_were_read_are_compared_again_when_they_are_passed_over(tmp_path):
    """Also where a file is too large for its hash to tell."""
    path = tmp_path / "data"
    write_lines(path)
    stream = stream_of(lines_of(path), lanes=1)
    tokens(stream, 20)
    saved = checkpoint(stream)
    path.write_text(path.read_text().replace("line 2 ", "word 2 "))
    again = stream_of(lines_of(path), lanes=1)
    again.load_state_dict(saved[1], saved[0])
    with pytest.raises(
        ValueError, match=f"data file {path} has changed in its first .* lines, which this run has read"
    ):
        tokens(again, 1)


@pytest.mark.parametrize("way", ["skip", "repair"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("files", [1, 4])
def test_after_a_bad_document_both_ways_out_lead_on(way, shuffle, files, tmp_path):
    """The run equals one whose file was good, or that skipped bad documents, from the beginning. Where there are more
    files than lanes, their sizes at the beginning decide which lane reads which."""
    for number in range(files):
        write_lines(tmp_path / f"{number}", kind="jsonl")
    path = tmp_path / f"{files - 1}"
    good = path.read_text()
    bad = good.replace('{"text": "line 41', '{"txt": "line 41')
    path.write_text(bad)
    source = SourceConfig(kind="jsonl", paths=[str(tmp_path / "*")])
    stream, saved, given = stream_of(source, shuffle=shuffle), [], []
    with pytest.raises(
        ValueError, match=f"data file {path}, line 42: .* Repair the file, or set on_bad_document: skip"
    ):
        for _ in range(300):
            saved.append(checkpoint(stream))
            given += tokens(stream, 1)
    saved, given = saved[-3], given[-2:]
    assert saved[1]["0"]["sources"][0]["read"][2] > 0
    if way == "skip":
        source.on_bad_document = "skip"
    else:
        path.write_text(good.replace("line 41", "a repaired line"))
    again = go_on(stream_of(source, shuffle=shuffle), saved)
    rest = tokens(again, 200)
    assert rest[: len(given)] == given
    assert again.epoch >= (1 if files == 1 else 0)
    later = go_on(stream_of(source, shuffle=shuffle), checkpoint(again))
    assert tokens(later, 20) == tokens(again, 20)
    if files == 1:  # else the sizes, and with them the lanes' shares, would be others from the beginning
        whole = tokens(stream_of(source, shuffle=shuffle), 350)
        start = whole.index(given[0])
        assert whole[start : start + 100] == rest[:100]


def test_a_damaged_file_that_no_lane_has_begun_may_be_replaced(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 30)
    (tmp_path / "5.txt").write_bytes(b"\xff")
    source = SourceConfig(kind="text", paths=[str(tmp_path / "*.txt")])
    stream, saved = stream_of(source, shuffle=False), None
    with pytest.raises(ValueError, match="5.txt is not UTF-8"):
        for _ in range(100):
            saved = checkpoint(stream)
            tokens(stream, 1)
    (tmp_path / "5.txt").write_text("text 5 " * 40)
    tokens(go_on(stream_of(source, shuffle=False), saved), 50)
    (tmp_path / "0.txt").write_text("text x " * 30)
    other_lanes = stream_of(source, shuffle=False, lanes=2).differences(*saved)
    assert other_lanes[0] == "  global_batch_size: 3 there, 2 now" and "0.txt" in other_lanes[1]
    assert stream_of(source, shuffle=False).differences(*saved) == [f"  sources[0]: changed: {tmp_path}/0.txt"]


def test_other_held_out_documents_are_said(tmp_path, caplog):
    for name in ("a", "b"):
        write_lines(tmp_path / name)
    validation = [lines_of(tmp_path / "b")]
    saved = checkpoint(stream_of(lines_of(tmp_path / "a"), validation=validation))
    go_on(stream_of(lines_of(tmp_path / "a"), validation=validation), saved)
    assert "holds other documents" not in caplog.text
    write_lines(tmp_path / "b", count=59)
    go_on(stream_of(lines_of(tmp_path / "a"), validation=validation), saved)
    assert "data.validation[0] holds other documents than before" in caplog.text


def test_a_large_file_written_to_is_said_where_samples_cannot_tell(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("xlstm_lm.data.sources.contents.HASHED_BYTES", 2**13)
    path = tmp_path / "a"
    write_lines(path, count=2000)
    saved = checkpoint(stream_of(lines_of(path)))
    go_on(stream_of(lines_of(path)), saved)
    assert "too large" not in caplog.text
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    go_on(stream_of(lines_of(path)), saved)
    assert "files too large to be compared in full were written to since the checkpoint" in caplog.text
