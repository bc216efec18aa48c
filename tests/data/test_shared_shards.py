"""Lanes of one process read a shard together: the same documents as alone, each read once."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import make_documents, write_json_lines
from tests.data.test_stream import LANES, assert_equal, beside, config_of, stream_of, take
from xlstm_lm.data import SourceConfig, shared_shards
from xlstm_lm.data.sources import readers

LAYOUTS = ["lines", "one file of lines", "parquet"]


@pytest.fixture
def lines_parsed(monkeypatch):
    """The lines of JSON that were parsed, each as often as it was."""
    parsed = []
    parse = readers.parse_json

    def parse_and_count(line, text_field):
        parsed.append(line)
        return parse(line, text_field)

    monkeypatch.setattr(readers, "parse_json", parse_and_count)
    return parsed


def alone(config):
    """A stream for each lane, which shares nothing."""
    return [stream_of(config, range(lane, lane + 1)) for lane in range(LANES)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lanes_together_give_what_each_gives_alone(layout, folder):
    """From the beginning and from a checkpoint, in which every lane stands elsewhere."""
    config = config_of(layout, folder)
    together, apart = stream_of(config), alone(config)
    assert_equal(take(together, 30), beside([take(one, 30) for one in apart]))
    states = json.loads(json.dumps(together.state_dict()))
    assert states == {key: value for one in apart for key, value in one.state_dict().items()}
    again = stream_of(config)
    again.load_state_dict(states)
    assert_equal(take(again, 60), beside([take(one, 60) for one in apart]))


def test_a_line_is_parsed_once_for_all_lanes(lines_parsed, folder):
    config = config_of("one file of lines", folder, shuffle_documents=1000)
    take(stream_of(config), 1)
    assert len(lines_parsed) == len(set(lines_parsed)) == 60
    lines_parsed.clear()
    for one in alone(config):
        take(one, 1)
    assert len(lines_parsed) == 60 * LANES


@pytest.mark.parametrize("on_bad_document", ["error", "skip"])
def test_bad_documents_come_to_the_lanes_that_would_meet_them_alone(on_bad_document, folder):
    documents = make_documents(60, seed=7)
    path = folder / "one.jsonl"
    write_json_lines(path, documents)
    lines = path.read_text().splitlines(keepends=True)
    lines[5:5], lines[30:30], lines[45:45] = ["{bad\n"], ['{"text": ""}\n'], ["[]\n", "{}\n"]
    path.write_text("".join(lines))
    config = config_of("one file of lines", folder)
    config.sources = [SourceConfig(kind="jsonl", paths=[str(path)], on_bad_document=on_bad_document)]
    if on_bad_document == "error":
        with pytest.raises(ValueError, match="line 6: not JSON"):
            take(stream_of(config), 20)
        return
    together, apart = stream_of(config), alone(config)
    assert_equal(take(together, 60), beside([take(one, 60) for one in apart]))
    assert together.skipped_documents == sum(one.skipped_documents for one in apart) > 3


def test_a_lane_for_which_too_much_waits_reads_alone(lines_parsed, folder, monkeypatch):
    config = config_of("one file of lines", folder)
    whole = take(stream_of(config), 60)
    lines_parsed.clear()
    monkeypatch.setattr(shared_shards, "WAITING_SIZE", 600)
    assert_equal(take(stream_of(config), 60), whole)
    assert len(lines_parsed) > 2 * len(set(lines_parsed))


def test_each_lanes_part_is_compared_with_what_it_had_read(folder):
    config = config_of("one file of lines", folder)
    stream = stream_of(config)
    take(stream, 30)
    states = stream.state_dict()
    positions = {state["sources"][0]["document"] for state in states.values()}
    assert len(positions) > 1
    path = folder / "one.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = max(positions) - 1
    lines[changed] = lines[changed].replace('"text": "7', '"text": "8')
    path.write_text("".join(lines))
    again = stream_of(config)
    again.load_state_dict(states)
    with pytest.raises(ValueError, match=r"has changed in its first \d+ documents, which this run has read"):
        take(again, 30)
