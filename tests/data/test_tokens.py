"""Token ids on disk: the rows of a run on the documents themselves, written once, and again after an interruption."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import make_documents, write_json_lines
from tests.data.test_stream import LAYOUTS, assert_equal, config_of, sources_of, stream_of, take
from xlstm_lm.base.recipe import read_recipe
from xlstm_lm.cli import main
from xlstm_lm.data import DataConfig, SourceConfig, build_tokenizer, train_bpe, validation_batches
from xlstm_lm.data.documents import documents
from xlstm_lm.data.sources import Piece, open_source
from xlstm_lm.data.sources.readers import ALL, Shard
from xlstm_lm.data.sources.record import ORDER, START, Position
from xlstm_lm.data.sources.tokens import read_tokens
from xlstm_lm.data.token_files import TokenFile, id_type, write_index
from xlstm_lm.data.tokenize_sources import tokenize
from xlstm_lm.data.tokenizer import TokenizerConfig

ONE_A_FILE = {"files", "fewer files than lanes", "mixture"}
"""Layouts with sources that are put together in fewer files of ids, which gives another order."""


def on_ids(config: DataConfig, out: Path) -> DataConfig:
    """The configuration with what data.yaml says in place of the documents."""
    data = read_recipe(out / "data.yaml")[0]["data"]
    sources = {name: [SourceConfig(**each) for each in data[name]] for name in ("sources", "validation")}
    tokenizer = TokenizerConfig(**data["tokenizer"]) if "tokenizer" in data else config.tokenizer
    return DataConfig(**{**config.__dict__, **sources, "tokenizer": tokenizer})


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("\n".join(make_documents(60, seed=1)))
    return TokenizerConfig(
        kind="huggingface", name=str(train_bpe([str(folder / "*.txt")], vocab_size=300, out=folder / "made"))
    )


def test_after_a_file_that_broke_off_the_next_one_is_read(folder):
    tokenize(config_of("lines", folder), folder / "ids", processes=1)
    path = str(next((folder / "ids").rglob("*.bin")))
    whole = Shard(0, path, "second", Piece(0), START)
    broken = Shard(0, path, "first", Piece(0), Position(0, ALL))
    expected = [record.tokens.tolist() for record in read_tokens([whole], None, ORDER, strict=True)]
    left = [record.tokens.tolist() for record in read_tokens([broken, whole], None, ORDER, strict=True)]
    assert left == expected and expected


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ONE_A_FILE])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_run_on_ids_is_the_run_on_the_documents(layout, kind, folder, bpe):
    held_out = [SourceConfig(kind="text", paths=[str(folder / "text" / "*.txt")])]
    settings = {"validation": held_out, "validation_tokens": 500}
    config = config_of(layout, folder, **settings, **({"tokenizer": bpe} if kind == "bpe" else {}))
    tokenize(config, folder / "ids", processes=1)
    ids = on_ids(config, folder / "ids")
    expected, stream = take(stream_of(config), 60), stream_of(ids)
    batches = take(stream, 25)
    states = json.loads(json.dumps(stream.state_dict()))
    again = stream_of(ids)
    assert again.differences(stream.fingerprint(), states) == []
    again.load_state_dict(states)
    batches += take(again, 35)
    for batch, other in zip(batches, expected):
        batch.document_ids = other.document_ids  # a line of a file of ids has another name
    assert_equal(batches, expected)
    tokenizer = build_tokenizer(config.tokenizer)
    rows = [list(validation_batches(each, tokenizer, rows=3, rank=0, world_size=1)) for each in (config, ids)]
    assert [batch.targets_BT.tolist() for batch in rows[0]] == [batch.targets_BT.tolist() for batch in rows[1]]


def test_blank_and_bad_lines_keep_their_numbers(folder):
    path = folder / "one.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3:3], lines[20:20], lines[40:40] = ["\n", "{bad\n"], ['{"text": ""}\n'], ["[]\n"]
    path.write_text("".join([*lines, "{}\n"]))
    source = SourceConfig(kind="jsonl", paths=[str(path)], on_bad_document="skip")
    config = DataConfig(**{**config_of("one file of lines", folder).__dict__, "sources": [source]})
    (statistics,) = tokenize(config, folder / "ids", processes=1).values()
    assert (statistics.documents, statistics.skipped) == (60, 3)
    batches, expected = take(stream_of(on_ids(config, folder / "ids")), 50), take(stream_of(config), 50)
    assert [batch.tokens_BT.tolist() for batch in batches] == [batch.tokens_BT.tolist() for batch in expected]


def test_files_of_a_document_each_are_put_together(folder):
    config = config_of("files", folder)
    tokenize(config, folder / "ids", processes=1)
    (source,) = on_ids(config, folder / "ids").sources
    opened = open_source(source)
    assert opened.num_shards == 1
    texts = [bytes(record.tokens.tolist()).decode() for record in opened.read([Piece(0)])]
    assert texts == make_documents(40, seed=40)


def test_the_files_are_those_of_megatron(folder):
    """Read as Megatron-LM reads them (megatron/core/datasets/indexed_dataset.py), by another program than ours."""
    config = config_of("lines", folder)
    tokenize(config, folder / "ids", processes=1)
    for number in range(3):
        content = (folder / "ids" / "sources-0" / f"{number:06}.idx").read_bytes()
        assert content[:9] == b"MMIDIDX\x00\x00" and struct.unpack_from("<QB", content, 9) == (1, 8)
        sequences, bounds = struct.unpack_from("<QQ", content, 18)
        lengths = np.frombuffer(content, np.int32, sequences, 34)
        begins = np.frombuffer(content, np.int64, sequences, 34 + lengths.nbytes)
        documents = np.frombuffer(content, np.int64, bounds, 34 + lengths.nbytes + begins.nbytes)
        assert documents.tolist() == list(range(sequences + 1))
        ids = (folder / "ids" / "sources-0" / f"{number:06}.bin").read_bytes()
        read = [np.frombuffer(ids, np.uint16, length, begin) for length, begin in zip(lengths, begins)]
        assert [bytes(each.tolist()).decode() for each in read] == make_documents(50 + number, seed=number)


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_any_id_of_the_vocabulary_fits(vocab_size, tmp_path):
    written = [[0, vocab_size - 1], [], [5]]
    dtype = id_type(vocab_size)
    (tmp_path / "a.bin").write_bytes(np.concatenate(written).astype(dtype).tobytes())
    write_index(tmp_path / "a.bin", [len(each) for each in written], dtype)
    file = TokenFile(tmp_path / "a.bin")
    assert [file.document(number).tolist() for number in range(3)] == written


def test_what_is_complete_is_kept_and_the_rest_is_written_again(folder):
    config = config_of("lines", folder)
    whole = tokenize(config, folder / "whole", processes=1)
    lines = []
    tokenize(config, folder / "ids", processes=1)
    made = sorted((folder / "ids" / "sources-0").glob("*.bin"))
    made[1].with_suffix(".idx").unlink()
    made[1].write_bytes(made[1].read_bytes()[:100])
    times = [path.stat().st_mtime_ns for path in made]
    assert tokenize(config, folder / "ids", processes=1, report=lines.append) == whole
    assert [path.stat().st_mtime_ns != time for path, time in zip(made, times)] == [False, True, False]
    assert lines[0] == "2 of 3 files are complete already" and lines[1].startswith(f"3/3 {made[1]}: 51 documents, ")
    for path in made:
        assert path.read_bytes() == (folder / "whole" / "sources-0" / path.name).read_bytes()


def test_other_documents_or_another_tokenizer_are_refused(folder, bpe):
    config = config_of("lines", folder)
    tokenize(config, folder / "ids", processes=1)
    other = DataConfig(**{**config.__dict__, "tokenizer": bpe})
    with pytest.raises(ValueError, match="sources-0 holds token ids made with another tokenizer, vocab_size: choose"):
        tokenize(other, folder / "ids", processes=1)
    ids = on_ids(config, folder / "ids")
    with pytest.raises(ValueError, match="was tokenized by another tokenizer than data.tokenizer: set"):
        stream_of(DataConfig(**{**ids.__dict__, "tokenizer": bpe}))
    write_json_lines(folder / "lines" / "0.jsonl", ["another"])
    with pytest.raises(ValueError, match="made with another source, shard_sizes"):
        tokenize(config, folder / "ids", processes=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "it holds 9.* bytes instead of"),
        (lambda path: path.with_suffix(".idx").unlink(), "No such file"),
        (lambda path: path.with_suffix(".idx").write_bytes(b""), "is empty"),
        (lambda path: path.with_suffix(".idx").write_bytes(b"x" * 99), "is no index of Megatron's format"),
        (lambda path: (path.parent / "tokens.json").unlink(), "tokens.json is missing. It is written by xlstm-lm"),
    ],
)
def test_files_that_are_not_complete_are_refused(damage, message, folder):
    config = config_of("lines", folder)
    tokenize(config, folder / "ids", processes=1)
    damage(folder / "ids" / "sources-0" / "000001.bin")
    with pytest.raises(ValueError, match=message):
        stream_of(on_ids(config, folder / "ids"))


def test_statistics_are_those_of_the_texts(folder, bpe):
    config = config_of("lines", folder, tokenizer=bpe)
    (statistics,) = tokenize(config, folder / "ids", processes=1).values()
    texts = [text for number in range(3) for text in make_documents(50 + number, seed=number)]
    tokenizer = build_tokenizer(bpe)
    encoded = [tokenizer.encode(text) for text in texts]
    counts = Counter(token for each in encoded for token in each)
    lengths = sorted(map(len, encoded))
    assert (statistics.documents, statistics.tokens) == (len(texts), sum(lengths))
    assert statistics.bytes == sum(len(text.encode()) for text in texts)
    assert (statistics.used_ids, statistics.longest) == (len(counts), lengths[-1])
    assert statistics.lengths["0.5"] == lengths[(len(lengths) - 1) // 2]
    entropy = -sum(count / sum(lengths) * math.log2(count / sum(lengths)) for count in counts.values())
    assert statistics.entropy_bits == pytest.approx(entropy)
    written = json.loads((folder / "ids" / "sources-0" / "statistics.json").read_text())
    assert written["tokens"] == statistics.tokens


def test_a_text_is_written_once_of_those_that_are_alike(folder):
    """Also across files; documents keep their numbers, and a second call changes nothing."""
    texts = ["one", "two", "one", "three", "", "two"], ["four", "one"], ["", "five"]
    for number, each in enumerate(texts):
        write_json_lines(folder / "lines" / f"{number}.jsonl", each)
    config = config_of("lines", folder)
    (statistics,) = tokenize(config, folder / "ids", processes=1, deduplicate=True).values()
    assert (statistics.documents, statistics.duplicates) == (5, 3)
    kept = "one", "two", "three", "four", "five"
    assert statistics.tokens == statistics.bytes == len("".join(kept))
    assert statistics.used_ids == len(set("".join(kept)))
    (source,) = on_ids(config, folder / "ids").sources
    opened = open_source(source)
    records = list(opened.read([Piece(0), Piece(1), Piece(2)]))
    assert [bytes(record.tokens.tolist()).decode() for record in records] == list(kept)
    assert [(record.piece, record.document) for record in records] == [(0, 0), (0, 1), (0, 3), (1, 0), (2, 1)]
    assert opened.num_tokens == statistics.tokens + 5
    assert list(tokenize(config, folder / "ids", processes=1, deduplicate=True).values()) == [statistics]
    with pytest.raises(ValueError, match="sources-0 holds token ids made with another deduplicate"):
        tokenize(config, folder / "ids", processes=1)


def test_training_documents_are_cut_at_ends_of_lines(folder):
    """Pieces are documents, each once where duplicates are left out; held-out documents stay whole."""
    texts = ["ab\ncd\nefgh\n", "", "a line of 20 letters", "ab\ncd\nxyz"]
    for name in ("lines", "held-out"):
        (folder / name).mkdir(exist_ok=True)
        write_json_lines(folder / name / "0.jsonl", texts)
    sources, held_out = (
        [SourceConfig(kind="jsonl", paths=[str(folder / name / "0.jsonl")])] for name in ("lines", "held-out")
    )
    config = DataConfig(sources=sources, validation=held_out)
    tokenize(config, folder / "ids", processes=1, deduplicate=True, piece_characters=7)
    on_them = on_ids(config, folder / "ids")

    def written(source: SourceConfig) -> list[str]:
        return [bytes(record.tokens.tolist()).decode() for record in open_source(source).read([Piece(0)])]

    assert written(on_them.sources[0]) == ["ab\ncd\n", "efgh\n", "a line ", "of 20 l", "etters", "xyz"]
    assert written(on_them.validation[0]) == [text for text in texts if text]
    with pytest.raises(ValueError, match="sources-0 holds token ids made with another piece_characters"):
        tokenize(config, folder / "ids", processes=1, deduplicate=True)


def test_the_command_prints_statistics_and_how_to_train(folder, capsys):
    recipe = folder / "recipe.yaml"
    source = f"{{kind: jsonl, paths: [{folder}/lines/*.jsonl]}}"
    recipe.write_text(f"model: {{vocab_size: 257}}\ndata: {{sources: [{source}], context_length: 32}}\n")
    main(["tokenize", "--config", str(recipe), "--out", str(folder / "ids"), "--processes", "1"])
    printed = capsys.readouterr().out
    assert "153 documents, " in printed and "257 ids occur" in printed
    assert printed.endswith(f"xlstm-lm train --config {recipe} --config {folder}/ids/data.yaml\n")
    recipe.write_text(f"data: {{sources: [{source}], context_length: 32}}\n")  # a recipe of data alone
    main(["tokenize", "--config", str(recipe), "--out", str(folder / "ids"), "--processes", "1"])
    assert capsys.readouterr().out.endswith(" --model PRESET\n")


@pytest.mark.slow
def test_many_processes_write_the_same(folder, bpe):
    config = DataConfig(sources=[sources_of(name, folder)[0] for name in ("lines", "parquet")], tokenizer=bpe)
    assert tokenize(config, folder / "one", processes=1) == tokenize(config, folder / "two", processes=2)
    for path in (folder / "one").rglob("*.bin"):
        assert path.read_bytes() == (folder / "two" / path.relative_to(folder / "one")).read_bytes()


def test_ids_have_no_text_to_score(folder):
    config = config_of("lines", folder)
    tokenize(config, folder / "ids", processes=1)
    (source,) = on_ids(config, folder / "ids").sources
    with pytest.raises(ValueError, match="holds token ids and no text"):
        next(documents(open_source(source)))
