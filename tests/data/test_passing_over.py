"""Documents that a stream leaves out after a roll-back: as if they were not in the data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.data.conftest import write_json_lines
from tests.data.test_stream import assert_equal, take
from xlstm_lm.data import Batch, DataConfig, SourceConfig, TrainingStream, build_tokenizer

LANES = 3
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def write(tmp_path):
    """Writes a file of JSON lines for each lane into a new folder and returns the source."""
    numbers = itertools.count()

    def write_files(texts: list[list[str]], weight: float = 1.0) -> SourceConfig:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        for lane, documents in enumerate(texts):
            write_json_lines(folder / f"{lane}.jsonl", documents)
        return SourceConfig(kind="jsonl", paths=[f"{folder}/*.jsonl"], weight=weight)

    return write_files


def stream_of(*sources: SourceConfig, lanes: range = range(LANES), **changes) -> TrainingStream:
    values = {"context_length": 16, "global_batch_size": LANES, "shuffle": False, "num_workers": 0} | changes
    config = DataConfig(sources=list(sources), **values)
    return TrainingStream(config, build_tokenizer(config.tokenizer), lanes=lanes, seed=3)


def places_in(batches: list[Batch]) -> dict[str, list]:
    """Places of all documents of batches, by lane, as they come back from a checkpoint."""
    lanes = {str(lane): [each for batch in batches for each in batch.document_places[lane]] for lane in range(LANES)}
    return json.loads(json.dumps(lanes))


def texts_of(prefix: str, counts: list[int]) -> list[list[str]]:
    return [[f"{prefix}{lane}.{n} " + "x" * (11 * n % 29) for n in range(count)] for lane, count in enumerate(counts)]


@quick
@given(
    context=st.integers(4, 40),
    begin=st.integers(0, 4),
    bad=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    stop=st.integers(0, 6),
)
@example(context=16, begin=2, bad=(0, 1), stop=2)  # documents of which a part has been used
def test_what_comes_is_the_stream_without_the_documents(write, context, begin, bad, stop):
    """Against the elements of each lane written out by hand: e D1 e D2 ..., also over a restart on other ranks."""
    texts = texts_of("d", [40, 41, 42])
    source = write(texts)
    stream = stream_of(source, context_length=context)
    take(stream, begin)
    states = stream.state_dict()
    take(stream, bad[0])
    rows = take(stream, bad[1])
    stream.load_state_dict(json.loads(json.dumps(states)))
    stream.pass_over(places_in(rows))
    after = take(stream, stop)
    ranks = [stream_of(source, lanes=lanes, context_length=context) for lanes in (range(1), range(1, LANES))]
    for rank in ranks:
        rank.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    later = [[row for rank in ranks for row in (rank.next_batch()).tokens_BT.tolist()] for _ in range(3)]

    tokenizer = build_tokenizer(stream._config.tokenizer)
    end = tokenizer.end_of_document
    for lane in range(LANES):
        dropped = {each for batch in rows for each in batch.document_ids[lane]}
        documents = [[end, *text.encode()] for text in texts[lane]]
        used, elements = begin * context, []
        for number, document in enumerate(documents):
            if used >= len(document):
                used -= len(document)
                continue
            if not any(each.endswith(f"/{lane}.jsonl:{number + 1}") for each in dropped):
                elements += document[used:]
            used = 0
        found = [row for batch in after for row in batch.tokens_BT[lane].tolist()]
        found += [element for batch in later for element in batch[lane]]
        assert len(elements) >= len(found) and found == elements[: len(found)]


def test_a_mixture_draws_as_if_the_documents_were_not_there(write):
    """Against a stream over files that lack them."""
    texts = [texts_of("a", [40, 41, 42]), texts_of("b", [50, 51, 52])]
    stream = stream_of(write(texts[0]), write(texts[1], weight=0.4))
    states = stream.state_dict()
    rows = take(stream, 9)[4:6]
    names = {each for batch in rows for lane in batch.document_ids for each in lane}
    stream.load_state_dict(states)
    stream.pass_over(places_in(rows))
    found = take(stream, 30)
    assert not names & {each for batch in found for lane in batch.document_ids for each in lane}

    folders = [Path(each.paths[0]).parent for each in stream._config.sources]
    left = [
        [
            [text for n, text in enumerate(lane_texts) if f"{folder}/{lane}.jsonl:{n + 1}" not in names]
            for lane, lane_texts in enumerate(of_source)
        ]
        for folder, of_source in zip(folders, texts)
    ]
    assert sum(len(lane) for of_source in left for lane in of_source) < 276
    never = take(stream_of(write(left[0]), write(left[1], weight=0.4)), 30)
    for one, other in zip(found, never, strict=True):
        assert one.tokens_BT.equal(other.tokens_BT) and one.resets_BT.equal(other.resets_BT)


def test_workers_pass_over_the_same_documents_once_in_a_shuffled_order_and_forget_them(write):
    source = write(texts_of("d", [12, 13, 14]))
    streams = [stream_of(source, shuffle=True, shuffle_documents=5, num_workers=workers) for workers in (0, 1)]
    states = streams[0].state_dict()
    rows = take(streams[0], 4)[2:]
    found = []
    for stream in streams:
        stream.load_state_dict(states)
        stream.pass_over(places_in(rows))
        found.append(take(stream, 60))
        assert not any("passed_over" in state for state in stream.state_dict().values())
        stream.close()
    assert_equal(*found)
    ids = {each for batch in rows for lane in batch.document_ids for each in lane}
    seen = [{each for lane in batch.document_ids for each in lane} for batch in found[0]]
    assert ids and not ids & set().union(*seen[:8]) and ids <= set().union(*seen)  # the next epoch has them again
