"""Sources: every kind and compression gives its documents; what is wrong with a file is said with its name and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path

import pyarrow
import pytest
import torch

from xlstm_lm.data import DataConfig, SourceConfig, TrainingStream, build_tokenizer, open_source, validation_batches
from xlstm_lm.data.sources import START, Piece, Position, Record


def zstandard(data: bytes) -> bytes:
    """Two frames, as tools that compress in parallel write them."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}
TEXTS = ["first\r\nline two\n", "日本語 \x00 \u2028 end", "third"]


def read(config: SourceConfig, first: Position = START) -> list[Record]:
    source = open_source(config)
    pieces = [Piece(shard) for shard in range(source.num_shards)]
    return list(source.read(pieces, first))


def train_on(config: SourceConfig, num_workers: int = 0, lanes: int = 1) -> TrainingStream:
    data = DataConfig(context_length=8, global_batch_size=lanes, sources=[config], num_workers=num_workers)
    return TrainingStream(data, build_tokenizer(data.tokenizer), lanes=range(lanes), seed=0)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_files(suffix, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    records = read(SourceConfig(kind="text", paths=[str(tmp_path / f"*.txt{suffix}")]))
    assert [record.text for record in records] == TEXTS
    assert [Path(record.id).name for record in records] == [f"{number}.txt{suffix}" for number in range(3)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps({"id": number, "body": text}, ensure_ascii=bool(number)) for number, text in enumerate(TEXTS)]
    path.write_bytes(COMPRESS[suffix]("\n\n".join(lines).encode()))
    config = SourceConfig(kind="jsonl", paths=[str(path)], text_field="body")
    assert [record.text for record in read(config)] == TEXTS
    assert [record.id for record in read(config)] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert [record.text for record in read(config, read(config)[0].end)] == TEXTS[1:]


def test_lines_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\ntwo \u2028 still two\nthree".encode())
    records = read(SourceConfig(kind="text_lines", paths=[str(path)]))
    assert [record.text for record in records] == ["one", "two \u2028 still two", "three"]


def test_parquet(folder):
    config = SourceConfig(kind="parquet", paths=[str(folder / "rows.parquet")])
    records = read(config)
    assert [record.document for record in records] == list(range(70))
    assert records[0].text.startswith("9.0:")
    assert read(config, records[32].end) == records[33:]
    with pytest.raises(ValueError, match="has no column 'body': set text_field to one of text$"):
        open_source(SourceConfig(kind="parquet", paths=[str(folder / "rows.parquet")], text_field="body"))


def test_patterns_find_each_file_once_in_order(folder):
    patterns = [str(folder / "text" / "*.txt"), str(folder / "**" / "00?.txt"), str(folder / "text" / "003.txt")]
    names = [record.id for record in read(SourceConfig(kind="text", paths=patterns))]
    assert names == sorted(set(names)) and len(names) == 42


def test_the_standard_library_is_split_for_good():
    train, held_out = (
        open_source(SourceConfig(kind="python_stdlib", split=split)) for split in ("train", "validation")
    )
    assert not set(train.names) & set(held_out.names)
    assert len(train.names) > 300 and 0.03 < len(held_out.names) / len(train.names) < 0.12
    # By name alone: the same file is on the same side on every machine.
    assert {"argparse.py", "asyncio/tasks.py"} <= set(train.names) | set(held_out.names)
    assert not [name for name in train.names if {"test", "tests", "site-packages"} & set(Path(name).parts)]
    assert all(not Path(name).is_absolute() for name in train.names + held_out.names)


def broken(tmp_path: Path, what: str) -> tuple[SourceConfig, str]:
    """A source with a fault, and the message that has to name it."""
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "good"}).encode()
    lines = {
        "no field": (b'{"txt": "x", "n": 1}', "no field 'text' among txt, n"),
        "not JSON": (b'{"text": "x"', "not JSON (Expecting ',' delimiter at column 13)"),
        "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 (byte 10 of the line: invalid start byte)"),
        "no text": (b'{"text": 7}', "field 'text' holds int, not text"),
        "no object": (b'["text"]', "a JSON object with a field 'text' is wanted, not list"),
        "half a pair": (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair"),
    }
    if what in lines:
        path.write_bytes(b"\n".join([good, good, lines[what][0], good]))
        return SourceConfig(kind="jsonl", paths=[str(path)]), f"data file {path}, line 3: {lines[what][1]}"
    if what == "text not UTF-8":
        path.write_bytes(b"abc\xe4")
        (tmp_path / "good.jsonl").write_bytes(b"good")
        message = f"data file {path} is not UTF-8 (byte 3: unexpected end of data)"
        return SourceConfig(kind="text", paths=[str(tmp_path / "*.jsonl")]), message
    assert what == "broken off"
    path = tmp_path / "bad.jsonl.gz"
    many = b"\n".join(json.dumps({"text": random.Random(n).random()}).encode() for n in range(999))
    path.write_bytes(gzip.compress(good + b"\n" + many)[:-50])
    return SourceConfig(kind="jsonl", paths=[str(path)], text_field="text"), f"data file {path}"


FAULTS = ["no field", "not JSON", "not UTF-8", "no text", "no object", "half a pair", "text not UTF-8"]


@pytest.mark.parametrize("what", FAULTS)
def test_a_bad_document_is_named_with_file_and_line(what, tmp_path):
    config, message = broken(tmp_path, what)
    stream = train_on(config)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        for _ in range(50):
            stream.next_batch()
    assert "Repair the file, or set on_bad_document: skip" in str(raised.value)


def test_a_compressed_file_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "bad.txt.gz"
    path.write_bytes(gzip.compress(random.Random(0).randbytes(500))[:-50])
    with pytest.raises(ValueError, match=re.escape(f"data file {path} cannot be read (Compressed file ended")):
        train_on(SourceConfig(kind="text", paths=[str(path)])).next_batch()


@pytest.mark.parametrize("what", FAULTS)
def test_bad_documents_are_skipped_and_counted_on_request(what, tmp_path, caplog):
    config, message = broken(tmp_path, what)
    config.on_bad_document = "skip"
    stream = train_on(config)
    tokens = torch.cat([stream.next_batch().tokens_BT.flatten() for _ in range(50)])
    assert set(build_tokenizer(DataConfig().tokenizer).decode(tokens[tokens != 256].tolist())) == set("good")
    assert stream.skipped_documents == stream.epoch > 0
    assert caplog.text.count("are skipped; the first: " + message) == 1


def test_the_number_of_skipped_documents_survives_a_restart(tmp_path):
    config, _ = broken(tmp_path, "no field")
    config.on_bad_document = "skip"
    stream = train_on(config)
    for _ in range(20):
        stream.next_batch()
    again = train_on(config)
    again.load_state_dict(stream.state_dict())
    for one in (stream, again):
        for _ in range(20):
            one.next_batch()
    assert again.skipped_documents == stream.skipped_documents


def test_an_error_in_a_worker_arrives_as_the_message_alone(tmp_path):
    config, message = broken(tmp_path, "not JSON")
    stream = train_on(config, num_workers=1)
    try:
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            for _ in range(50):
                stream.next_batch()
        assert "Traceback" not in str(raised.value)
    finally:
        stream.close()


def test_a_missing_file_is_named_before_any_work(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("good")
    missing = SourceConfig(kind="text", paths=[str(good), str(tmp_path / "none*.txt")])
    with pytest.raises(ValueError, match=re.escape(f"data file {tmp_path}/none*.txt is missing")):
        train_on(missing)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is a folder: name the files in it")):
        train_on(SourceConfig(kind="text", paths=[str(tmp_path)]))
    # The validation files too.
    data = DataConfig(sources=[SourceConfig(kind="text", paths=[str(good)])], validation=[missing])
    tokenizer = build_tokenizer(data.tokenizer)
    with pytest.raises(ValueError, match="is missing"):
        TrainingStream(data, tokenizer, lanes=range(1), seed=0)
    with pytest.raises(ValueError, match="is missing"):
        validation_batches(data, tokenizer, rows=1, rank=0, world_size=1)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_an_empty_file_is_named_before_any_work(kind, tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(ValueError, match=re.escape(f"data file {path} is empty")):
        train_on(SourceConfig(kind=kind, paths=[str(path)]))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=re.escape(f"parquet {path} cannot be read")):
        train_on(SourceConfig(kind="parquet", paths=[str(path)]))


def test_more_lanes_than_documents_are_refused_with_the_remedy(tmp_path, capfd):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": "x"}) + "\n" for _ in range(3)))
    for num_workers in (0, 1):
        stream = train_on(SourceConfig(kind="jsonl", paths=[str(path)]), num_workers, lanes=4)
        with pytest.raises(ValueError, match=r"no document for lane 3, one of the 4 .*few.jsonl is empty; use a sm"):
            stream.next_batch()
        if num_workers:
            stream._producers[0][1]._process.wait()
            assert stream._producers[0][1]._process.returncode == 0
        stream.close()
    assert "Fatal Python error" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "xml"},
            "kind is 'xml'; it must be one of text, text_lines, jsonl, csv, parquet, tar, tokens, hub, python_stdlib",
        ),
        ({"kind": "text"}, "needs paths"),
        ({"kind": "python_stdlib", "paths": ["x"]}, "takes no paths"),
        ({"kind": "hub"}, "needs dataset"),
        ({"kind": "text", "paths": ["x"], "dataset": "y"}, "belong to sources of kind hub"),
        ({"kind": "python_stdlib", "split": "test"}, "split 'test' of python_stdlib is not known: train or validation"),
        ({"kind": "python_stdlib", "weight": 0.0}, "weight is 0.0; it must be a number above 0"),
        ({"kind": "python_stdlib", "on_bad_document": "ignore"}, "it must be one of error, skip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)
