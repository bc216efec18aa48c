"""Data sets on the hub, against a hub on loopback: read, continued, waited for, and refused with a reason."""

from __future__ import annotations

import gzip
import io
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.asker import Asker, lanes_of
from tests.data.conftest import make_documents
from tests.data.loopback_hub import COMMIT, LoopbackHub
from xlstm_lm.data import SourceConfig, open_source
from xlstm_lm.data.sources.patience import Patience


def damaged(parquet: bytes) -> bytes:
    """The file with its first page overwritten."""
    begin = pq.ParquetFile(io.BytesIO(parquet)).metadata.row_group(0).column(0).data_page_offset
    return parquet[:begin] + b"\xff" * 40 + parquet[begin + 40 :]


@pytest.fixture(scope="module")
def hub():
    def json_lines(seed: int) -> bytes:
        return gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in make_documents(60, seed)).encode())

    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": make_documents(60, 9), "n": list(range(60))}), parquet, row_group_size=20)
    files = {f"data/train-{seed}.jsonl.gz": json_lines(seed) for seed in range(3)}
    files["rows/one.parquet"] = parquet.getvalue()
    for number, other in enumerate([{"n": [1] * 20}, {"n": ["x"] * 20, "m": [0.5] * 20}]):
        parquet = io.BytesIO()
        pq.write_table(pa.table({"text": make_documents(20, 20 + number), **other}), parquet)
        files[f"mixed/{number}.parquet"] = parquet.getvalue()
    whole = parquet.getvalue()
    files |= {"broken/0.parquet": whole[:200], "broken/1.parquet": whole, "broken/2.parquet": damaged(whole)}
    with LoopbackHub("org/texts", files) as running:
        yield running


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    asker = Asker(hub, tmp_path_factory.mktemp("hf_home"))
    yield asker
    asker.close()


JSON_LINES = "data_files=['data/*']"


def test_documents_come_from_the_hub_and_continue_exactly(ask):
    fingerprint = ask(f"open_stream({JSON_LINES})")
    assert fingerprint["sources"][0]["revision"] == COMMIT and fingerprint["sources"][0]["files"] == 3
    whole = ask("tokens(60)")
    written = {text for seed in range(3) for text in make_documents(60, seed)}
    # What stands between two ends in a lane is one of the documents.
    pieces = [piece for lane in lanes_of(whole) for piece in lane.split("\0")[1:-1]]
    assert len(pieces) > 50 and set(pieces) <= written
    ask(f"open_stream({JSON_LINES})")
    ask("tokens(25)")
    states = ask("stream.state_dict()")
    ask(f"open_stream(num_workers=1, {JSON_LINES})")
    ask(f"stream.load_state_dict({states})")
    assert ask("tokens(35)") == whole[25:]
    ask("stream.close()")


def test_parquet_on_the_hub(ask):
    assert ask("open_stream(data_files=['rows/*.parquet'])")["sources"][0]["files"] == 1
    pieces = [piece for lane in lanes_of(ask("tokens(30)")) for piece in lane.split("\0")[1:-1]]
    assert len(pieces) > 20 and set(pieces) <= set(make_documents(60, 9))


def test_of_parquet_on_the_hub_only_the_text_column_is_read(ask):
    assert ask("open_stream(data_files=['mixed/*.parquet'])")["sources"][0]["files"] == 2
    pieces = {piece for lane in lanes_of(ask("tokens(60)")) for piece in lane.split("\0")[1:-1]}
    assert pieces == set(make_documents(20, 20)) | set(make_documents(20, 21))
    message = ask("open_stream(data_files=['mixed/*.parquet'], text_field='body')")
    assert message == "ValueError: hub data set org/texts has no column 'body': set text_field to one of text, n"


def test_damaged_files_on_the_hub_are_named_and_skipped_on_request(ask):
    ask("open_stream(data_files=['broken/[12].parquet'])")
    message = ask("tokens(60)")
    assert message.startswith("ValueError: data file org/texts:train:1 cannot be read (hf://datasets/org/texts@")
    assert f"{COMMIT}/broken/2.parquet: " in message and "on_bad_document: skip" in message
    ask("open_stream(data_files=['broken/*.parquet'], on_bad_document='skip')")
    records = ask("list(stream._dealt[0].source.read([Piece(0), Piece(1), Piece(2)]))")
    problems = [problem for _, _, _, _, problem, *_ in records if problem]
    assert [text for _, _, text, *_ in records if text] == make_documents(20, 21)
    assert len(problems) == 2 and "broken/0.parquet: " in problems[0] and "broken/2.parquet: " in problems[1]


def test_a_local_folder_called_like_the_data_set_is_not_read(ask, tmp_path):
    (tmp_path / "org" / "texts" / "data").mkdir(parents=True)
    (tmp_path / "org" / "texts" / "data" / "train-0.jsonl").write_text('{"text": "local"}\n' * 9)
    ask(f"open_stream({JSON_LINES})")
    whole = ask("tokens(4)")
    before = ask("__import__('os').getcwd()")
    try:
        ask(f"__import__('os').chdir({str(tmp_path)!r})")
        ask(f"open_stream({JSON_LINES})")
        assert ask("tokens(4)") == whole
    finally:
        ask(f"__import__('os').chdir({before!r})")


def test_a_run_stays_with_the_commit_it_began_with(ask, hub):
    fingerprint = ask(f"open_stream({JSON_LINES})")
    ask("tokens(4)")
    states = ask("stream.state_dict()")
    rest = ask("tokens(4)")
    hub.newest = "f" * 40
    try:
        assert ask(f"open_stream({JSON_LINES})")["sources"][0]["revision"] == "f" * 40
        assert ask(f"stream.differences({fingerprint}, {states})") == []
        ask(f"stream.load_state_dict({states}, {fingerprint})")
        assert ask("tokens(4)") == rest
        assert ask("stream.fingerprint()") == fingerprint
        assert (
            "revision"
            in ask(f"open_stream({JSON_LINES}, revision='main') and stream.differences({fingerprint}, {states})")[0]
        )
    finally:
        hub.newest = COMMIT


def test_offline_mode_is_no_outage_to_wait_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="hub data set org/texts cannot be read: HF_HUB_OFFLINE=1 is set, which forbids"
    ):
        open_source(SourceConfig(kind="hub", dataset="org/texts"))


def test_a_short_failure_is_waited_for(ask, hub):
    ask(f"open_stream({JSON_LINES})")
    whole = ask("tokens(4)")
    hub.unavailable_until = time.monotonic() + 2
    ask(f"open_stream(retry_seconds=60, {JSON_LINES})")
    assert time.monotonic() > hub.unavailable_until
    hub.unavailable_until = time.monotonic() + 2
    assert ask("tokens(4)") == whole


def test_a_hub_that_stays_away_is_said(ask, hub):
    hub.unavailable_until = time.monotonic() + 100
    try:
        message = ask("open_stream(retry_seconds=1.5)")
    finally:
        hub.unavailable_until = 0
    assert message.startswith("ConnectionError: hub data set org/texts has not answered for 2 s (HfHubHTTPError: ")
    assert "503" in message and "goes on from the last checkpoint" in message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("data_files=['no/*.jsonl']", "DataFilesNotFoundError: No (supported) data files found"),
        ("split='nope', " + JSON_LINES, "ValueError: Bad split: nope. Available splits: ['train']"),
        ("revision='v2'", "404"),
        ("config_name='abc', " + JSON_LINES, "ValueError: BuilderConfig 'abc' not found"),
        ("text_field='body', " + JSON_LINES, "has no column 'body': set text_field to one of text"),
    ],
)
def test_what_no_waiting_mends_is_said_at_once(fields, reason, ask):
    begin = time.monotonic()
    message = ask(f"open_stream({fields})")
    assert message.startswith("ValueError: hub data set org/texts ") and reason in message
    assert time.monotonic() - begin < 10


@pytest.mark.slow
def test_a_long_failure_while_reading_loses_nothing(ask, hub):
    """Longer than the libraries' own patience: the shard is opened again where it broke off."""
    ask(f"open_stream({JSON_LINES})")
    whole = ask("tokens(60)")
    ask(f"open_stream(retry_seconds=300, {JSON_LINES})")
    hub.unavailable_until = time.monotonic() + 45
    assert ask("tokens(60)") == whole
    assert time.monotonic() > hub.unavailable_until


def test_pauses_grow_and_end(monkeypatch):
    pauses = []
    monkeypatch.setattr("xlstm_lm.data.sources.patience.random.random", lambda: 0.0)
    monkeypatch.setattr("xlstm_lm.data.sources.patience.time.sleep", pauses.append)
    monkeypatch.setattr("xlstm_lm.data.sources.patience.time.monotonic", lambda: 1000.0 + sum(pauses))
    config = SourceConfig(kind="hub", dataset="org/texts", retry_seconds=200)
    answers = iter([ConnectionError("down"), TimeoutError(), ConnectionResetError(), "answer"])

    def action():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert Patience(config).call(action) == "answer"
    assert pauses == [1, 2, 4]

    def never():
        raise ConnectionError("down for good")

    pauses.clear()
    with pytest.raises(ConnectionError, match=r"has not answered for 200 s \(ConnectionError: down for good\)"):
        Patience(config).call(never)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    with pytest.raises(ValueError, match=r"cannot be read \(FileNotFoundError: gone\); check dataset"):
        Patience(config).wait(FileNotFoundError("gone"))
