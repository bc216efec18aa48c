"""Sources that people have: several fields in a template, tar archives, and files behind a URL."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import make_documents
from tests.data.test_going_on import go_on, stream_of, tokens
from xlstm_lm.data import SourceConfig, open_source
from xlstm_lm.data.sources import Piece
from xlstm_lm.data.sources.readers import ALL
from xlstm_lm.data.sources.record import Position

ROWS = [{"title": f"title {n}", "text": f"text {n}", "year": 1900 + n, "other": None} for n in range(30)]
TEMPLATE = "# {title} ({year})\n{{{text}}}"
TEXTS = [f"# title {n} ({1900 + n})\n{{text {n}}}" for n in range(30)]


def read(config: SourceConfig, **place):
    return list(open_source(config).read([Piece(0)], **place))


def write(path, kind: str, rows=ROWS) -> SourceConfig:
    if kind == "parquet":
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("title", "text", "year")}), path)
    elif kind == "csv":
        path.write_text("title,text,year\n" + "".join(f"{row['title']},{row['text']},{row['year']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(kind=kind, paths=[str(path)], template=TEMPLATE)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_template_joins_fields(kind, tmp_path):
    source = write(tmp_path / "data", kind)
    records = read(source)
    assert [record.text for record in records] == TEXTS
    assert [record.text for record in read(source, first=records[11].end)] == TEXTS[12:]
    stream = stream_of(source)
    tokens(stream, 10)
    saved = stream.fingerprint(), stream.state_dict()
    assert tokens(go_on(stream_of(source), saved), 20) == tokens(stream, 20)
    source.template = "{title}"
    assert "  sources[0].template: " in stream_of(source).differences(*saved)[0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{title", "expected '}' before end of string"),
        ("no field", "it names no field"),
        ("{title!r}", "braces must hold the name of a field alone"),
        ("{year:>9}", "braces must hold the name of a field alone"),
        ("{}", "braces must hold the name of a field alone"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template, reason, tmp_path):
    source = write(tmp_path / "data", "jsonl")
    source.template = template
    with pytest.raises(ValueError, match=f"cannot be used: {reason}; write fields in braces"):
        read(source)


def test_fields_that_a_template_lacks_are_named(tmp_path):
    source = write(tmp_path / "data", "jsonl")
    source.template, source.on_bad_document = "{title}{other}{absent}", "skip"
    assert read(source)[0].problem.endswith("line 1: field 'other' holds NoneType, not text")
    source.template = "{absent}"
    assert "no field 'absent' among title, text, year, other; the setting is template" in read(source)[0].problem
    source = write(tmp_path / "rows", "parquet")
    source.template = "{absent}"
    with pytest.raises(ValueError, match="has no column 'absent': set template to one of title, text"):
        open_source(source)
    with pytest.raises(ValueError, match="takes the place of text_field, .*: remove text_field"):
        SourceConfig(kind="jsonl", paths=["a"], template="{a}", text_field="b")
    with pytest.raises(ValueError, match="remove template .kind text"):
        SourceConfig(kind="text", paths=["a"], template="{a}")


def archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return content.getvalue()


def samples(texts: list[str]) -> dict[str, bytes]:
    files = {}
    for number, text in enumerate(texts):
        files[f"part/{number:03}.jpg"] = b"\xff\xd8"
        files[f"part/{number:03}.caption.txt"] = text.encode()
        files[f"part/{number:03}.json"] = json.dumps({"text": f"json {number}", "year": number}).encode()
    return files


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_archives_hold_a_document_in_files_of_one_stem(compress, tmp_path):
    texts = make_documents(30, seed=3)
    path = tmp_path / "a.tar"
    path.write_bytes(compress(archive(samples(texts))))
    source = SourceConfig(kind="tar", paths=[str(path)], text_field="caption.txt")
    records = read(source)
    assert [record.text for record in records] == texts
    for index in (0, 13, 29):
        assert [record.text for record in read(source, first=records[index].end)] == texts[index + 1 :]
    source.text_field = "text"
    assert [record.text for record in read(source)] == [f"json {number}" for number in range(30)]
    source.template = "{year}: {caption.txt}"
    assert read(source)[7].text == f"7: {texts[7]}"
    stream = stream_of(source)
    tokens(stream, 20)
    saved = json.loads(json.dumps([stream.fingerprint(), stream.state_dict()]))
    assert tokens(go_on(stream_of(source), saved), 40) == tokens(stream, 40)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a.txt": b"one", "b.txt": b"\xff", "c.txt": b"three"}, "document 2: b.txt is not UTF-8 (byte 0"),
        ({"a.txt": b"one", "b.jpg": b"", "c.txt": b"three"}, "document 2: no field 'txt' among none"),
        ({"a.txt": b"one", "b.json": b"{", "c.txt": b"three"}, "document 2: b.json is not JSON"),
        ({"a.txt": b"one", "b.json": b"[1]", "c.txt": b"three"}, "document 2: b.json holds list, not a JSON object"),
    ],
)
def test_bad_documents_of_archives_are_named_and_good_ones_kept(files, problem, tmp_path):
    (tmp_path / "a.tar").write_bytes(archive(files))
    source = SourceConfig(kind="tar", paths=[str(tmp_path / "a.tar")], text_field="txt", on_bad_document="skip")
    records = read(source)
    assert [record.text for record in records] == ["one", "", "three"]
    assert problem in records[1].problem


def test_an_archive_that_breaks_off_is_named(tmp_path):
    content = archive({f"{number}.txt": b"x" * 600 for number in range(5)})
    (tmp_path / "a.tar").write_bytes(content[: 3 * 1536 + 700])
    source = SourceConfig(kind="tar", paths=[str(tmp_path / "a.tar")], text_field="txt", on_bad_document="skip")
    records = read(source)
    assert [bool(record.text) for record in records] == [True, True, True, False]
    assert "cannot be read after document 3 (unexpected end of data)" in records[-1].problem


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def write_file(folder: Path, kind: str, number: int) -> Path:
    """Write one of several files of a kind, with other documents for each number."""
    path = folder / f"{number}.{kind}"
    if kind == "tar":
        path.write_bytes(archive(samples(make_documents(20, seed=number))))
    elif kind in ("text", "text_lines"):
        path.write_text("\n".join(make_documents(20, seed=number)))
    else:
        write(path, kind, ROWS[number * 10 :][:10])
    return path


@pytest.mark.parametrize("kind", ["text", "text_lines", "jsonl", "csv", "parquet", "tar"])
def test_files_behind_a_url_are_read_as_local_ones(kind, memory, tmp_path):
    settings = {"text_field": "caption.txt"} if kind == "tar" else {}
    for number in range(3):
        path = write_file(tmp_path, kind, number)
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    local = SourceConfig(kind=kind, paths=[str(tmp_path / f"*.{kind}")], **settings)
    remote = SourceConfig(kind=kind, paths=[f"memory://bucket/*.{kind}"], **settings)
    expected = tokens(stream_of(local), 60)
    stream = stream_of(remote)
    assert tokens(stream, 25) == expected[:25]
    saved = json.loads(json.dumps([stream.fingerprint(), stream.state_dict()]))
    assert tokens(go_on(stream_of(remote), saved), 35) == expected[25:]
    memory.pipe(f"/bucket/0.{kind}", memory.cat(f"/bucket/1.{kind}"))
    assert stream_of(remote).differences(*saved) != []


@pytest.mark.parametrize("kind", ["text_lines", "jsonl", "csv", "parquet", "tar"])
def test_after_a_file_that_broke_off_the_next_one_is_read(kind, tmp_path):
    for number in range(2):
        write_file(tmp_path, kind, number)
    settings = {"text_field": "caption.txt"} if kind == "tar" else {}
    source = open_source(SourceConfig(kind=kind, paths=[str(tmp_path / f"*.{kind}")], **settings))
    second = list(source.read([Piece(1)]))
    left = list(source.read([Piece(0), Piece(1)], Position(0, ALL, 3, None, None)))
    assert [record.text for record in left] == [record.text for record in second] != []


def test_a_url_without_a_file_or_a_file_system_is_named(memory):
    for url, message in (
        ("memory://bucket/*.txt", "is missing: no file matches it"),
        ("nothing://bucket/a.txt", "nothing://bucket/a.txt cannot be opened: Protocol not known: nothing"),
    ):
        with pytest.raises(ValueError, match=message.replace("*", ".")):
            open_source(SourceConfig(kind="text", paths=[url]))


def test_a_url_that_fails_stops_the_run_and_is_not_skipped(memory, monkeypatch):
    """An outage is no damage: skipping bad documents would lose the rest of the file."""
    memory.pipe("/bucket/a.jsonl", b'{"text": "a"}\n' * 30)
    source = SourceConfig(kind="jsonl", paths=["memory://bucket/a.jsonl"], on_bad_document="skip")
    opened = open_source(source)

    def fail(*arguments, **settings):
        raise OSError("the network is down")

    monkeypatch.setattr(type(memory), "open", fail)
    with pytest.raises(ConnectionError, match="a.jsonl cannot be fetched .OSError: the network is down.; the same"):
        list(opened.read([Piece(0)]))
