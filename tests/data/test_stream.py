"""The training stream: one order for any number of ranks and workers, exact continuation, epochs, mixtures."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.data import Batch, DataConfig, SourceConfig, TrainingStream, build_tokenizer, open_source
from xlstm_lm.data.lanes import DealtSource, hashed_order

LANES = 6


def sources_of(layout: str, folder: Path) -> list[SourceConfig]:
    text = SourceConfig(kind="text", paths=[str(folder / "text" / "*.txt")])
    lines = SourceConfig(kind="jsonl", paths=[str(folder / "lines" / "*.jsonl")], weight=0.5)
    few = SourceConfig(kind="text", paths=[str(folder / "few" / "*.txt")])
    one = SourceConfig(kind="jsonl", paths=[str(folder / "one.jsonl")])
    rows = SourceConfig(kind="parquet", paths=[str(folder / "rows.parquet")], weight=0.25)
    return {
        "files": [text],
        "lines": [lines],
        "fewer files than lanes": [few],
        "one file of lines": [one],
        "parquet": [rows],
        "mixture": [text, lines, rows],
    }[layout]


LAYOUTS = ["files", "lines", "fewer files than lanes", "one file of lines", "parquet", "mixture"]


def config_of(layout: str, folder: Path, **changes) -> DataConfig:
    settings = {"context_length": 32, "global_batch_size": LANES, "shuffle_documents": 7, "num_workers": 0} | changes
    return DataConfig(sources=sources_of(layout, folder), **settings)


def stream_of(config: DataConfig, lanes: range = range(LANES), seed: int = 3) -> TrainingStream:
    return TrainingStream(config, build_tokenizer(config.tokenizer), lanes=lanes, seed=seed)


def take(stream: TrainingStream, count: int) -> list[Batch]:
    return [stream.next_batch() for _ in range(count)]


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert torch.equal(batch.tokens_BT, other.tokens_BT)
        assert torch.equal(batch.targets_BT, other.targets_BT)
        assert torch.equal(batch.resets_BT, other.resets_BT)
        assert batch.document_ids == other.document_ids


def beside(parts: list[list[Batch]]) -> list[Batch]:
    """The batches of several ranks as those of one."""
    return [
        Batch(
            *(torch.cat([getattr(one, name) for one in ranks]) for name in ("tokens_BT", "targets_BT", "resets_BT")),
            document_ids=[ids for one in ranks for ids in one.document_ids],
        )
        for ranks in zip(*parts)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continuation_is_exact_from_any_batch(layout, folder):
    config = config_of(layout, folder)
    stream = stream_of(config)
    batches, states = [], [stream.state_dict()]
    for _ in range(90):
        batches.append(stream.next_batch())
        states.append(json.loads(json.dumps(stream.state_dict())))
    epochs = {source["epoch"] for state in states[80].values() for source in state["sources"]}
    assert max(epochs) >= 1
    for point in (0, 1, 2, 7, 20, 33, 48, 80):
        again = stream_of(config)
        again.load_state_dict(states[point])
        assert_equal(batches[point : point + 10], take(again, 10))
        assert again.state_dict() == states[point + 10]


@pytest.mark.parametrize("layout", ["files", "mixture"])
def test_order_does_not_depend_on_ranks(layout, folder):
    config = config_of(layout, folder)
    whole = take(stream_of(config), 20)
    for cuts in ([0, 3, 6], [0, 1, 6], [0, 2, 4, 6]):
        ranks = [stream_of(config, range(*cut)) for cut in itertools.pairwise(cuts)]
        assert_equal(whole[:10], beside([take(rank, 10) for rank in ranks]))
        states = {key: value for rank in ranks for key, value in rank.state_dict().items()}
        # The same run goes on with another number of ranks.
        others = [stream_of(config, range(2)), stream_of(config, range(2, 6))]
        for other in others:
            other.load_state_dict(states)
        assert_equal(whole[10:], beside([take(other, 10) for other in others]))


def test_order_does_not_depend_on_workers_and_the_state_is_of_what_was_consumed(folder):
    config = config_of("mixture", folder)
    in_process = stream_of(config)
    expected = take(in_process, 30)
    one = stream_of(config_of("mixture", folder, num_workers=1, prefetch_batches=5))
    two = stream_of(config_of("mixture", folder, num_workers=2))
    try:
        batches = take(one, 5)
        # When to stop is up to the training process, whoever else gets its signals.
        worker = one._producers[0][1]._process
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
        batches += take(one, 10)
        # The worker is further by now, but the state is not.
        two.load_state_dict(one.state_dict())
        batches += take(two, 15)
        worker.kill()
        with pytest.raises(RunError, match="a data worker was killed by SIGKILL, as the system does where memory"):
            take(one, 100)
    finally:
        one.close()
        two.close()
    assert_equal(expected, batches)
    assert two.state_dict() == in_process.state_dict()


CONSUMER = """
import json, sys
from pathlib import Path
from tests.data.test_stream import config_of, stream_of
folder, count = Path(sys.argv[1]), int(sys.argv[2])
stream = stream_of(config_of("mixture", folder, num_workers=1))
log = folder / "log.jsonl"
lines = log.read_text().splitlines(keepends=True) if log.exists() else []
if lines:
    stream.load_state_dict(json.loads(lines[-1])["state"])
with log.open("a") as file:
    for _ in range(count - len(lines)):
        batch = stream.next_batch()
        file.write(json.dumps({"tokens": batch.tokens_BT.tolist(), "state": stream.state_dict()}) + "\\n")
        file.flush()
        if len(sys.argv) > 3:
            print(stream._producers[0][1]._process.pid, flush=True)
            if len(log.read_text().splitlines()) == int(sys.argv[3]):
                input()
stream.close()
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_killed_process_goes_on_where_it_was_and_leaves_no_worker(folder):
    program = [sys.executable, "-c", CONSUMER, str(folder), "40"]
    repository = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": repository}
    process = subprocess.Popen(
        [*program, "17"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int([process.stdout.readline() for _ in range(17)][-1])
    assert is_running(worker)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    patience = time.monotonic() + 5
    while is_running(worker) and time.monotonic() < patience:
        time.sleep(0.02)
    assert not is_running(worker)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 17

    subprocess.run(program, env=environment, check=True)
    given = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stream = stream_of(config_of("mixture", folder))
    for entry in given:
        assert entry["tokens"] == stream.next_batch().tokens_BT.tolist()
    assert given[-1]["state"] == stream.state_dict()


def documents_of_epoch(config: DataConfig, epoch: int, seed: int = 3) -> list[list[tuple[str, str]]]:
    """Documents that each lane reads in an epoch, as (id, text)."""
    dealt = DealtSource(open_source(config.sources[0]), config, seed, 0)
    lanes = []
    for lane in range(config.global_batch_size):
        documents = []
        for record, state in dealt.documents(lane, dealt.initial_state(), build_tokenizer(config.tokenizer)):
            if state["epoch"] > epoch:
                break
            if state["epoch"] == epoch:
                documents.append((record.id, record.text))
        lanes.append(documents)
    return lanes


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("layout", ["files", "lines", "one file of lines", "parquet"])
def test_an_epoch_gives_every_document_to_one_lane_once(layout, shuffle, folder):
    config = config_of(layout, folder, shuffle=shuffle)
    source = open_source(config.sources[0])
    plain = [(record.id, record.text) for record in source.read(DealtSource(source, one_lane(config), 0, 0).deal(0)[0])]
    for epoch in (0, 1):
        lanes = documents_of_epoch(config, epoch)
        assert all(lanes)
        assert Counter(document for lane in lanes for document in lane) == Counter(plain)
    assert (documents_of_epoch(config, 0) != documents_of_epoch(config, 1)) == shuffle
    assert (documents_of_epoch(config, 0) != documents_of_epoch(config, 0, seed=4)) == shuffle


def one_lane(config: DataConfig) -> DataConfig:
    return DataConfig(**{**config.__dict__, "global_batch_size": 1, "shuffle": False})


def test_fewer_files_than_lanes_are_cut_in_pieces_that_make_up_the_files(folder, caplog):
    config = config_of("fewer files than lanes", folder)
    lanes = documents_of_epoch(config, 0)
    assert [len(lane) for lane in lanes] == [1] * LANES
    pieces = {name: text for lane in lanes for name, text in lane}
    for path in (folder / "few").glob("*.txt"):
        assert "".join(pieces[f"{path}[{part}/3]"] for part in (1, 2, 3)) == path.read_bytes().decode()
    stream_of(config)
    assert "2 files for 6 lanes (global_batch_size): each file is cut in pieces" in caplog.text


def test_the_seed_and_nothing_else_orders_documents(folder):
    config = config_of("mixture", folder)
    one, same, other = (take(stream_of(config, seed=seed), 5) for seed in (3, 3, 4))
    assert_equal(one, same)
    assert any(not torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(one, other))


def test_hashed_order_is_pinned():
    # Another order would break the continuation of runs begun with an earlier version.
    assert hashed_order(8, "shards", 3, 0, 1) == [5, 0, 6, 4, 7, 3, 1, 2]
    assert sorted(hashed_order(1000, "a")) == list(range(1000))
    assert hashed_order(1000, "a") != hashed_order(1000, "b")


def test_lanes_get_about_the_same_amount_of_text(folder):
    config = DataConfig(global_batch_size=32)
    source = open_source(SourceConfig(kind="python_stdlib"))
    dealt = DealtSource(source, config, 0, 0)
    loads = sorted(sum(source.shard_sizes[piece.shard] for piece in lane) for lane in dealt.deal(0))
    assert loads[len(loads) // 2] < 1.5 * loads[0]


def test_lanes_get_as_many_shards_as_each_other_where_sizes_are_unknown():
    source = open_source(SourceConfig(kind="python_stdlib"))
    source.shard_sizes = [0] * source.num_shards
    dealt = DealtSource(source, DataConfig(global_batch_size=32), 0, 0)
    counts = [len(pieces) for pieces in dealt.deal(0)]
    assert max(counts) - min(counts) <= 1


def test_mixtures_follow_their_weights_by_tokens(tmp_path):
    # Documents of very different length: counted by documents, the shares would be far off.
    sources = []
    for name, letter, length, weight in (("a", "a", 10, 5.0), ("b", "b", 400, 3.0), ("c", "c", 90, 2.0)):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(letter * length + "\n" for _ in range(64)))
        sources.append(SourceConfig(kind="text_lines", paths=[str(path)], weight=weight))
    config = DataConfig(context_length=64, global_batch_size=8, sources=sources, num_workers=0)
    tokens = torch.stack([batch.tokens_BT for batch in take(stream_of(config, range(8)), 400)])
    counts = torch.bincount(tokens.flatten(), minlength=257)[[97, 98, 99]].double()
    assert torch.allclose(counts / counts.sum(), torch.tensor([0.5, 0.3, 0.2]).double(), atol=0.04)
    # Lanes do not all begin with the same source.
    assert len(set(tokens[0, :, 1].tolist())) > 1


def test_the_fingerprint_names_what_alters_the_order(folder):
    base = stream_of(config_of("files", folder)).fingerprint()
    assert base == json.loads(json.dumps(base)) == stream_of(config_of("files", folder, num_workers=3)).fingerprint()

    def differing(stream: TrainingStream) -> set[str]:
        return {key for key, value in stream.fingerprint().items() if base[key] != value}

    assert differing(stream_of(config_of("files", folder), seed=4)) == {"seed"}
    assert differing(stream_of(config_of("files", folder, context_length=33))) == {"context_length"}
    assert differing(stream_of(config_of("files", folder, shuffle_documents=8))) == {"shuffle_documents"}
    assert differing(stream_of(config_of("lines", folder))) == {"sources"}
    path = folder / "text" / "000.txt"
    path.write_text(path.read_text() + "more")
    assert differing(stream_of(config_of("files", folder))) == {"sources"}


def test_a_state_of_other_lanes_is_refused(folder):
    stream = stream_of(config_of("files", folder))
    states = stream_of(config_of("files", folder), range(3)).state_dict()
    with pytest.raises(ValueError, match="holds 3 lanes but not lane 3: it belongs to another global_batch_size"):
        stream.load_state_dict(states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 0}, "data.context_length is 0; it must be a whole number from 1"),
        ({"global_batch_size": -1}, "data.global_batch_size is -1; it must be a whole number from 1"),
        ({"num_workers": -1}, "data.num_workers is -1; it must be a whole number from 0"),
        ({"sources": []}, "data.sources is empty"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)
