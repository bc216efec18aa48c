"""Documents of CSV files: quoted as spreadsheets write them, continued within a file, damaged in every way."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from tests.data.test_going_on import go_on, stream_of, tokens
from xlstm_lm.data import SourceConfig, open_source
from xlstm_lm.data.sources import Piece

TEXTS = ["plain", 'with "quotes", a comma', "two\nlines\r\nof it", "", "ü \u2028", "x" * 200_000]


def write(path, texts=TEXTS, columns=("id", "text")):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows((number, text) for number, text in enumerate(texts))
    return SourceConfig(kind="csv", paths=[str(path)])


def read(config, **place):
    return list(open_source(config).read([Piece(0)], **place))


@pytest.mark.parametrize("compressed", [False, True])
def test_rows_are_documents_and_go_on_behind_any_of_them(compressed, tmp_path):
    path = tmp_path / "a.csv"
    config = write(path)
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    records = read(config)
    assert [record.text for record in records] == TEXTS and not any(record.problem for record in records)
    assert [record.id for record in records] == [f"{path}:{row}" for row in range(1, 7)]
    for index, record in enumerate(records):
        assert read(config, first=record.end) == records[index + 1 :]


def test_a_byte_order_mark_and_blank_rows_are_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext,id\r\none,1\r\n\r\ntwo,2\r\n".encode())
    assert [(record.text, record.document) for record in read(SourceConfig(kind="csv", paths=[str(path)]))] == [
        ("one", 0),
        ("two", 2),
    ]


@pytest.mark.parametrize(
    ("content", "problem", "good"),
    [
        (b"id,body\n1,a\n", "row 1: no field 'text' among id, body; the setting is text_field", []),
        (b"id,text\n1,a,b\n2,c\n", "row 1: 3 fields in a file of 2 columns", ["c"]),
        (b"id,text\n1\n2,c\n", "row 1: no field 'text' among id", ["c"]),
        (b'id,text\n1,a\n2,"open\n', "cannot be read after row 1 (unexpected end of data)", ["a"]),
        (b"id,text\n1,a\n2,\xff\n", "'utf-8' codec can't decode byte 0xff", []),
    ],
)
def test_bad_rows_are_named_and_good_ones_kept(content, problem, good, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    records = read(SourceConfig(kind="csv", paths=[str(path)], on_bad_document="skip"))
    assert [record.text for record in records if not record.problem] == good
    (bad,) = (record.problem for record in records if record.problem)
    assert bad.startswith(f"data file {path}") and problem in bad


def test_a_run_goes_on_in_the_same_order_and_refuses_changed_rows(tmp_path):
    path = tmp_path / "a.csv"
    source = write(path, [f"document {number}" for number in range(60)])
    whole, stream = stream_of(source), stream_of(source)
    expected = tokens(whole, 40)
    before = tokens(stream, 15)
    saved = json.loads(json.dumps([stream.fingerprint(), stream.state_dict()]))
    assert before + tokens(go_on(stream_of(source), saved), 25) == expected
    assert saved[0]["sources"][0]["text_field"] == "text"
    path.write_text(path.read_text().replace("document 1\n", "Document 1\n"))
    assert "sources[0]" in " ".join(stream_of(source).differences(*saved))
    first = read(source)[3].end
    path.write_text(path.read_text().replace("document 2\n", "Document 2\n"))
    with pytest.raises(ValueError, match="has changed in its first 4 rows"):
        read(source, first=first)
