"""Lanes give one order of documents, however they are shared out over ranks and wherever a run stops."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import write_json_lines
from xlstm_lm.data import Batch, DataConfig, SourceConfig, TrainingStream, build_tokenizer, open_source
from xlstm_lm.data.lanes import DealtSource

MOST_LANES = 4
files_of_documents = st.lists(st.integers(MOST_LANES, 9), min_size=1, max_size=6)
"""Documents of each file: at least one for every lane that shares the file."""
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def shares(draw: st.DrawFn, lanes: int) -> list[range]:
    """The lanes of each rank, for any number of ranks."""
    cuts = draw(st.sets(st.integers(1, lanes - 1))) if lanes > 1 else set()
    return list(itertools.starmap(range, itertools.pairwise([0, *sorted(cuts), lanes])))


@pytest.fixture
def write_files(tmp_path):
    numbers = itertools.count()

    def write(counts: list[int]) -> SourceConfig:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        for number, count in enumerate(counts):
            texts = [f"{number}/{index}" + "x" * (7 * index % 23) for index in range(count)]
            write_json_lines(folder / f"{number}.jsonl", texts)
        return SourceConfig(kind="jsonl", paths=[f"{folder}/*.jsonl"])

    return write


def rows_of(ranks: list[TrainingStream], steps: int) -> list[tuple[list[int], list[bool], list[str]]]:
    """Every row of `steps` batches of all ranks, in lane order: its targets, resets and documents."""
    found = []
    for _ in range(steps):
        batches: list[Batch] = [rank.next_batch() for rank in ranks]
        found += [
            (targets.tolist(), resets.tolist(), ids)
            for batch in batches
            for targets, resets, ids in zip(batch.targets_BT, batch.resets_BT, batch.document_ids)
        ]
    return found


@quick
@given(data=st.data(), counts=files_of_documents, lanes=st.integers(1, MOST_LANES), context=st.integers(1, 40))
def test_any_ranks_and_restarts_give_the_same_rows(write_files, data, counts, lanes, context):
    config = DataConfig(
        sources=[write_files(counts)],
        context_length=context,
        global_batch_size=lanes,
        shuffle_documents=data.draw(st.integers(1, 5), "shuffle_documents"),
        num_workers=0,
    )

    def ranks_of(shared: list[range]) -> list[TrainingStream]:
        return [TrainingStream(config, build_tokenizer(config.tokenizer), lanes=each, seed=3) for each in shared]

    runs = data.draw(st.lists(st.tuples(shares(lanes), st.integers(0, 6)), min_size=1, max_size=4), "runs")
    expected = rows_of(ranks_of([range(lanes)]), sum(steps for _, steps in runs))
    found, states = [], None
    for shared, steps in runs:
        ranks = ranks_of(shared)
        for rank in ranks:
            if states is not None:
                rank.load_state_dict(states)
        found += rows_of(ranks, steps)
        states = json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))
    assert found == expected


@quick
@given(
    counts=files_of_documents,
    lanes=st.integers(1, MOST_LANES),
    block=st.integers(1, 5),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_an_epoch_has_every_document_once(write_files, counts, lanes, block, shuffle, epoch):
    source = write_files(counts)
    config = DataConfig(sources=[source], global_batch_size=lanes, shuffle_documents=block, shuffle=shuffle)
    dealt = DealtSource(open_source(source), config, seed=3, index=0)
    tokenizer = build_tokenizer(config.tokenizer)
    seen = Counter()
    for lane in range(lanes):
        begin = {**dealt.initial_state(), "epoch": epoch}
        for record, after in dealt.documents(lane, begin, tokenizer):
            if after["epoch"] != epoch:
                break
            seen[record.text.rstrip("x")] += 1
    assert seen == Counter(f"{number}/{index}" for number, count in enumerate(counts) for index in range(count))
