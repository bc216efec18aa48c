"""Local files are taken for what they hold, whatever they are called and however they came to lie where they do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xlstm_lm.base.import_path import child_environment
from xlstm_lm.base.paths import user_path
from xlstm_lm.data import SourceConfig, open_source
from xlstm_lm.data.sources import Piece, Record
from xlstm_lm.data.sources.contents import HASHED_BYTES, hash_files

LINES = b'{"text": "one"}\n{"text": "two"}\n'
MARK = b"\xef\xbb\xbf"


def records(kind: str, *paths: Path | str, **settings) -> list[Record]:
    source = open_source(SourceConfig(kind=kind, paths=[str(path) for path in paths], **settings))
    return list(source.read([Piece(shard) for shard in range(source.num_shards)]))


def texts(kind: str, *paths: Path | str, **settings) -> list[str]:
    return [record.text for record in records(kind, *paths, **settings) if record.problem is None]


def test_compression_is_told_by_content_not_by_name(tmp_path):
    contents = {
        "a.GZ": gzip.compress(LINES),
        "plain.gz": LINES,
        "no suffix": gzip.compress(LINES) + gzip.compress(LINES),
        "b.txt": bz2.compress(LINES),
        "c.xz.part": lzma.compress(LINES),
        "d::e.zst": b"\x50\x2a\x4d\x18\x01\0\0\0x" + pa.compress(LINES, codec="zstd", asbytes=True),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert texts("jsonl", tmp_path / name) == ["one", "two"] * (2 if name == "no suffix" else 1)


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.jsonl", LINES)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": ["a"]}), buffer)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            file.addfile(tarfile.TarInfo("a.jsonl"))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["text", "text_lines", "jsonl"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (archive("zip"), "a zip archive: unpack it"),
        (archive("tar.gz"), "a tar archive: set kind: tar, or unpack it"),
        (archive("parquet"), "a parquet file: set kind: parquet"),
        ("hello".encode("utf-16"), "UTF-16, not UTF-8: convert it, for example by iconv"),
        ("hello".encode("utf-16-be"), "UTF-16, not UTF-8: convert it, for example by iconv"),
        ("hello".encode("utf-32"), "UTF-32, not UTF-8"),
        (bytes(3000), "zeros: it was not written to its end"),
    ],
    ids=[
        "zip",
        "tar",
        "parquet",
        "utf-16",
        "utf-16-be",
        "utf-32",
        "zeros",
    ],  # an archive holds the time: no name for a test
)
def test_what_is_no_text_is_named_with_the_remedy(kind, content, found, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    (record,) = records(kind, tmp_path / "a.txt")
    assert record.problem.startswith(f"data file {tmp_path}/a.txt cannot be read (it is {found}")
    (tmp_path / "b.txt").write_bytes(LINES)
    assert len(texts(kind, tmp_path / "*.txt", on_bad_document="skip")) == (1 if kind == "text" else 2)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "h\ufeffi\nyou".encode())
    assert texts("text", path) == ["h\ufeffi\nyou"]
    assert texts("text_lines", path) == ["h\ufeffi", "you"]
    path.write_bytes(MARK + LINES + MARK + b"\n" + MARK + LINES)  # as files joined by cat
    assert texts("jsonl", path) == ["one", "two"] * 2
    path.write_bytes(MARK)
    assert records("text", path)[0].problem == f"data file {path} is empty"


def test_json_read_as_plain_text_is_pointed_out(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(LINES)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{\n"text": "one"}'))
    (tmp_path / "c.txt").write_text("plain")
    (tmp_path / "d.JSONL").write_text('"only by name"')
    (tmp_path / "e.txt").write_bytes(MARK + json.dumps([{"text": "pretty"}], indent=1).encode())
    (tmp_path / "f.txt").write_text(json.dumps({"text": "x" * 2**21}))
    (tmp_path / "g.txt").write_text("[1] a footnote {of} 'text': \"so\"")
    named = ("a.txt", "b.json.gz", "d.JSONL", "e.txt", "f.txt")
    for kind, name in (("text_lines", "a.txt"), *(("text", name) for name in (*named, "c.txt", "g.txt"))):
        caplog.clear()
        for _ in range(2):
            open_source(SourceConfig(kind=kind, paths=[str(tmp_path / name)]))
        assert caplog.text.count("holds JSON and is read as plain text") == (name in named)
    caplog.clear()
    open_source(SourceConfig(kind="jsonl", paths=[str(tmp_path / "a.txt")]))
    assert not caplog.text


def test_of_parquet_only_the_text_column_is_read(tmp_path):
    others = [{}, {"extra": [1]}, {"id": [1]}, {"id": ["x"]}, {"id": [None]}, {"id": [{"a": 1}]}]
    for number, columns in enumerate(others):
        pq.write_table(pa.table({**columns, "text": [f"text {number}"]}), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "4 without rows.parquet")
    pq.write_table(pa.table({"text": pa.array(["text 6"]).dictionary_encode()}), tmp_path / "6.parquet")
    pq.write_table(pa.table({"te.xt": ["text 7"], "te": [{"xt": "no"}]}), tmp_path / "7.dot")
    assert texts("parquet", tmp_path / "*.parquet") == [f"text {number}" for number in range(7)]
    assert texts("parquet", tmp_path / "7.dot", text_field="te.xt") == ["text 7"]


def test_a_parquet_file_without_the_column_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "b.parquet")
    good, bad = records("parquet", tmp_path / "*.parquet")
    assert good.text == "good"
    assert bad.problem.startswith(f"data file {tmp_path}/b.parquet cannot be read (no column 'text' among body, n; ")


def test_damaged_parquet_is_named_and_what_is_before_the_damage_is_read(tmp_path):
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(100)]}), path, row_group_size=10)
    whole = path.read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole)
    path.write_bytes(whole[: len(whole) // 2])
    found = records("parquet", tmp_path / "*.parquet", on_bad_document="skip")
    assert len(found) == 101 and found[100].problem.startswith(f"data file {path} cannot be read (")
    begin = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0).data_page_offset
    path.write_bytes(whole[:begin] + b"\xff" * 40 + whole[begin + 40 :])
    found = records("parquet", path)
    assert [record.text for record in found[:-1]] == [f"row {n}" for n in range(20)]
    assert found[-1].problem.startswith(f"data file {path} cannot be read after row 20 (")
    source = open_source(SourceConfig(kind="parquet", paths=[str(path)]))
    assert list(source.read([Piece(0)], found[-1].end)) == []


def test_text_that_is_not_utf8_in_parquet_is_one_bad_document(tmp_path):
    offsets = pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]))
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    good, bad = records("parquet", tmp_path / "a.parquet")
    assert good.text == "a" and "row 2: field 'text' holds bytes, not text" in bad.problem


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("part[1].txt", "part[1].txt"),
        ("part[1].txt", "part*.txt"),
        ("[exp]/a.txt", "[exp]/a.txt"),
        ("[exp]/a.txt", "[exp]/*.txt"),
        ("[exp]/sub[2]/a.txt", "[exp]/**/*.txt"),
        ("q*x.txt", "q[*]x.txt"),
        ("two::colons.txt", "two::colons.txt"),
        (" a blank .txt ", " a blank .txt "),
    ],
)
@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_names_are_taken_literally_first(kind, name, path, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["here"]}), (tmp_path / name).open("wb"))
    else:
        (tmp_path / name).write_text("here")
    (tmp_path / "part1.txt.other").touch()
    assert texts(kind, tmp_path / path) == ["here"]


def test_one_file_by_several_names_is_one(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("folder").mkdir()
    assert texts("text", "a.txt", "./a.txt", "folder/../a.txt", str(tmp_path / "*.txt")) == ["a"]
    Path("link.txt").symlink_to("a.txt")
    Path("hard.txt").hardlink_to("a.txt")
    assert texts("text", "*.txt") == ["a"]
    assert (
        "hard.txt is the same file as a.txt and is read once; 1 more" in caplog.text and "./a.txt is" not in caplog.text
    )


def test_a_link_to_a_folder_above_gives_each_file_once_by_its_shortest_name(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "A").symlink_to(tmp_path)
    (record,) = records("text", tmp_path / "**/*.txt")
    assert record.id == str(tmp_path / "a.txt")
    assert len(caplog.records) == 1 and "more such names" in caplog.text


def test_what_is_no_regular_file_is_told_from_a_missing_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file .* write its content to a file"):
        records("text", tmp_path / "pipe")


def test_a_parquet_column_that_is_no_text_is_refused_with_those_that_are(tmp_path):
    columns = {"text": [["a"]], "raw": [b"a"], "body": ["a"], "long": pa.array(["a"], pa.large_string())}
    columns |= {"kind": pa.array(["a"]).dictionary_encode(), "view": pa.array(["a"], pa.string_view())}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name, found in (("text", "list<element: string>"), ("raw", "binary")):
        with pytest.raises(
            ValueError, match=f"holds {found}, not text, in column '{name}': .* one of body, long, kind, v"
        ):
            records("parquet", tmp_path / "a.parquet", text_field=name)
    for name in ("body", "long", "kind", "view"):
        assert texts("parquet", tmp_path / "a.parquet", text_field=name) == ["a"]


@pytest.mark.parametrize("indent", [None, 1])
def test_json_that_is_no_json_lines_is_named_with_the_remedy(indent, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}], indent=indent))
    assert "jq -c '.[]' FILE" in records("jsonl", tmp_path / "a.json")[0].problem


def test_a_link_to_nothing_is_not_passed_over_in_silence(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=re.escape(f"data file {tmp_path}/b.txt is a link to nowhere, which does not")):
        texts("text", tmp_path / "*.txt")
    assert texts("text", tmp_path / "*.txt", on_bad_document="skip") == ["a"]
    assert "1 links to nothing are skipped" in caplog.text


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert texts("text", "~/a.txt") == texts("text", "~/*.txt") == ["home"]
    assert user_path("~/a.txt") == tmp_path / "a.txt" and user_path("b/~") == Path("b/~")
    with pytest.raises(ValueError, match="~nobody-at-all/a.txt: there is no home folder of that name"):
        texts("text", "~nobody-at-all/a.txt")
    monkeypatch.chdir(tmp_path)
    Path("~draft.txt").write_text("draft")
    assert texts("text", "~draft.txt") == ["draft"]


def test_hashes_of_files_tell_every_change_and_cost_little(tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_lm.data.sources.contents.HASHED_BYTES", 2**20)
    large, small = tmp_path / "large", tmp_path / "small"
    content = bytearray(os.urandom(5 * 2**20))
    large.write_bytes(content)
    small.write_bytes(b"abc")
    before = hash_files([str(large), str(small)])
    assert before.newest == large.stat().st_mtime_ns and all(len(digest) == 8 for digest in before.digests)
    for at in (0, len(content) // 2, len(content) - 1):  # the first block, one in the middle, the last
        changed = bytearray(content)
        changed[at : at + 2**20] = bytes(len(changed[at : at + 2**20]))
        large.write_bytes(changed)
        after = hash_files([str(large), str(small)])
        assert after.digests[0] != before.digests[0] and after.digests[1] == before.digests[1]
    large.write_bytes(content)
    small.write_bytes(b"abd")
    after = hash_files([str(large), str(small)])
    assert after.digests[0] == before.digests[0] and after.digests[1] != before.digests[1]
    assert hash_files([str(small)]).newest is None
    assert HASHED_BYTES >= 2**28  # a few hundred megabytes are compared in full


def test_a_file_of_many_has_two_blocks_that_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_lm.data.sources.contents.HASHED_BYTES", 1)
    path = tmp_path / "file"
    digests = set()
    for at in (None, 0, 19_999):
        content = bytearray(20_000)
        if at is not None:
            content[at] = 1
        path.write_bytes(content)
        digests.update(hash_files([str(path)]).digests)
    assert len(digests) == 3


def test_a_field_of_json_that_python_refuses_is_one_bad_document(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = "[" * 100_000 + "]" * 100_000
    lines = ['{"text": "a"}', '{"n": ' + "9" * 5000 + ', "text": "b"}', deep, json.dumps({"text": "c"})]
    path.write_text("\n".join(lines))
    _, number, nested, last = records("jsonl", path)
    assert number.problem.startswith(f"data file {path}, line 2: JSON that cannot be read (Exceeds the limit")
    assert nested.problem == f"data file {path}, line 3: JSON that is nested too deep to be read"
    assert last.text == "c"


def test_a_program_may_end_while_it_reads(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    program = (
        "from xlstm_lm.data import SourceConfig, open_source\nfrom xlstm_lm.data.sources import Piece\n"
        "records = open_source(SourceConfig(kind='jsonl', paths=['a.jsonl'])).read([Piece(0)])\n"
        "print(next(records).text)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=child_environment(), capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == ("one\n", "")
