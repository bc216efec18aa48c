"""Sequence parallelism of whole runs: the same losses as without, at any layout, and refusals by name."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.processes import run_alone, run_ranks
from tests.training.runs import configure, records, write_text
from xlstm_lm.data import Batch
from xlstm_lm.models import HybridConfig, LSTMConfig
from xlstm_lm.parallel.process_group import Axis, World
from xlstm_lm.training.sequence_parallel import (
    check_sequence_parallel,
    deepspeed_section,
    own_slice,
    uses_of_divided_rows,
)


def run_of(tmp_path, sequence_parallel: int, **overrides):
    write_text(tmp_path)
    return configure(tmp_path, training__sequence_parallel=sequence_parallel, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"sequence_parallel": 3},
            "sequence_parallel is 3, which does not divide data.context_length 16: choose a multiple of 3, such as 15,",
        ),
        ({"sequence_parallel": 17}, "choose a multiple of 17, such as 17,"),
        ({"sequence_parallel": 8}, "slices of 2 tokens, but a convolution of the model looks back on 3.*at most 5"),
        (
            {"sequence_parallel": 2, "deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": True}}},
            "overlap_comm is true: .* Set overlap_comm to false",
        ),
    ],
)
def test_rows_that_cannot_be_divided_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_sequence_parallel(run_of(tmp_path, **overrides))


def test_a_family_without_blocks_is_refused(tmp_path):
    run = run_of(tmp_path, 2)
    run.model = LSTMConfig(vocab_size=257, embedding_dim=16, num_blocks=1)
    with pytest.raises(ValueError, match="model.family lstm computes whole rows only: choose another family, or 1"):
        check_sequence_parallel(run)


def test_processes_that_are_no_multiple_are_refused():
    world = World(rank=0, size=6, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="sequence_parallel is 4, which does not divide the 6 processes"):
        world.with_sequence(4)


def test_zero_3_does_not_overlap_where_rows_are_divided(tmp_path):
    section = {"zero_optimization": {"stage": 3}}
    divided, whole = (run_of(tmp_path, size, deepspeed=section) for size in (2, 1))
    assert deepspeed_section(divided)["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert deepspeed_section(whole) == section


def test_the_kernel_check_covers_the_calls_of_divided_rows():
    config = HybridConfig(vocab_size=61, embedding_dim=32, num_blocks=2, num_heads=2, pattern=["mlstm", "gated_delta"])
    uses = uses_of_divided_rows(config.operations(1))
    assert [(use.operation.name, use.sizes) for use in uses] == [("gated_delta", {"K": 12, "V": 24 + 12})]


def test_a_slice_keeps_tokens_targets_and_resets_together():
    tokens_BT = torch.arange(12).view(2, 6)
    batch = Batch(tokens_BT, tokens_BT + 1, tokens_BT % 5 == 0, [["a"], ["b"]])
    sequence = Axis(rank=1, size=3)
    world = World(rank=1, size=3, local_rank=1, device=torch.device("cpu"), sequence=sequence)
    own = own_slice(batch, world)
    assert own.tokens_BT.tolist() == [[2, 3], [8, 9]]
    assert own.targets_BT.tolist() == [[3, 4], [9, 10]]
    assert own.resets_BT.tolist() == [[False, False], [False, False]]
    assert own.document_ids == batch.document_ids


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), (4, 3)])
def test_divided_rows_give_the_same_run_and_whole_ones_go_on_with_it(tmp_path, ranks, stage):
    """Pairs of processes to step 10, then, from step 6, one process with whole rows."""
    for name in ("whole", "divided"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name)
    run_dir = tmp_path / "divided" / "run"
    run_alone("runs", "train", tmp_path / "whole", "{}")
    overrides = {"deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}}
    run_ranks(ranks, "runs", "train", tmp_path / "divided", json.dumps(overrides | {"training__sequence_parallel": 2}))
    divided = records(run_dir)
    for step in (9, 10):
        (run_dir / "checkpoints" / f"step_{step:08}" / "manifest.json").unlink()
    run_alone("runs", "train", tmp_path / "divided", "{}")
    expected = records(tmp_path / "whole" / "run")
    for found in (divided, records(run_dir)):
        assert [(each["split"], each["step"], each["tokens"]) for each in found] == [
            (each["split"], each["step"], each["tokens"]) for each in expected
        ]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
