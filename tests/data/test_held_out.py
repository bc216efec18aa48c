"""Validation batches: every target once over all ranks, the same each time, equally many on each rank."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest

from xlstm_lm.data import DataConfig, DocumentData, SourceConfig, build_tokenizer, validation_batches


def config_of(folder, **changes) -> DataConfig:
    sources = [
        SourceConfig(kind="text", paths=[str(folder / "text" / "*.txt")]),
        SourceConfig(kind="jsonl", paths=[str(folder / "one.jsonl")]),
    ]
    return DataConfig(**({"context_length": 24, "validation": sources} | changes))


def batches_of(config: DataConfig, rows: int = 3, rank: int = 0, world_size: int = 1):
    tokenizer = build_tokenizer(config.tokenizer)
    return list(validation_batches(config, tokenizer, rows=rows, rank=rank, world_size=world_size))


def stream_of(ranks) -> tuple[list[int], list[int], list[bool]]:
    """Inputs, targets and resets that count, batch after batch and rank after rank."""
    inputs, targets, resets = [], [], []
    for batches in zip(*ranks, strict=True):
        for batch in batches:
            counted = batch.targets_BT != -100
            inputs += batch.tokens_BT[counted].tolist()
            targets += batch.targets_BT[counted].tolist()
            resets += batch.resets_BT[counted].tolist()
    return inputs, targets, resets


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_all_ranks_together_hold_every_target_once(rows, world_size, folder):
    texts = [path.read_bytes().decode() for path in sorted((folder / "text").glob("*.txt"))]
    texts += [json.loads(line)["text"] for line in (folder / "one.jsonl").read_text().splitlines()]
    stream = [element for text in texts for element in [256, *text.encode()]]
    ranks = [batches_of(config_of(folder), rows, rank, world_size) for rank in range(world_size)]
    assert all(batch.tokens_BT.shape == (rows, 24) for batches in ranks for batch in batches)
    inputs, targets, resets = stream_of(ranks)
    assert inputs == stream and targets == [*stream[1:], 256]
    assert resets == [element == 256 for element in stream]


def test_twice_the_same(folder):
    first, second = (stream_of([batches_of(config_of(folder))]) for _ in range(2))
    assert first == second


def test_the_limit_is_exact_and_for_each_source(folder):
    inputs, _, resets = stream_of([batches_of(config_of(folder, validation_tokens=100))])
    everything = stream_of([batches_of(config_of(folder))])
    assert len(inputs) == 200
    assert inputs[:100] == everything[0][:100]
    assert inputs[100] == 256 and resets[100]


def test_ranks_share_one_tokenization_of_a_whole_run(folder):
    config, encoded, results = config_of(folder), [], []
    data = [DocumentData(config) for _ in range(3)]

    def on_first_of_rank():
        """A stand-in for `World.on_first`: the first rank to come computes, and all get copies."""
        numbers = itertools.count()

        def on_first(action):
            number = next(numbers)
            if number == len(results):
                results.append(pickle.dumps(action()))
            return pickle.loads(results[number])

        return on_first

    for one in data:
        encode = one.tokenizer.encode_pieces
        one.tokenizer.encode_pieces = lambda text, encode=encode: encoded.append(text) or encode(text)
        one.share(on_first_of_rank(), None, [])
    for _ in range(2):
        ranks = [list(one.validation_batches(rows=2, rank=rank, world_size=3)) for rank, one in enumerate(data)]
        assert stream_of(ranks) == stream_of([batches_of(config, 2, rank, 3) for rank in range(3)])
    assert len(encoded) == len(set(encoded)) == 100


def test_no_validation_no_batches(folder):
    assert batches_of(config_of(folder, validation=[])) == []


def test_bad_documents_stop_or_are_left_out(folder):
    path = folder / "one.jsonl"
    path.write_text('{"text": "a"}\n{"no": 1}\n{"text": "b"}\n')
    sources = [SourceConfig(kind="jsonl", paths=[str(path)])]
    with pytest.raises(ValueError, match=r"one\.jsonl, line 2: no field 'text'"):
        batches_of(config_of(folder, validation=sources))
    sources[0].on_bad_document = "skip"
    assert stream_of([batches_of(config_of(folder, validation=sources))])[0] == [256, 97, 256, 98]
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="has no document"):
        batches_of(config_of(folder, validation=sources))
