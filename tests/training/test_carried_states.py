"""States that go on from row to row: truncated back-propagation, checkpoints at any number of ranks, refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.models.family_cases import CONFIGS, make_model
from tests.training.processes import run_alone, run_ranks
from tests.training.runs import configure, records, write_text
from xlstm_lm.models import HybridConfig
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training.carried_states import CarriedStates, check_carry_state
from xlstm_lm.training.engine import TrainingModule
from xlstm_lm.training.loop import train

CARRY = {"training__carry_state": True}
RECURRENT = [name for name in CONFIGS if name != "transformer"]


@pytest.mark.parametrize("name", RECURRENT)
def test_two_rows_lose_what_one_row_of_both_does(name):
    torch.manual_seed(2)
    tokens_BT, targets_BT = torch.randint(0, 61, (2, 2, 18)).unbind(0)
    resets_BT = torch.zeros(2, 18, dtype=torch.bool)
    resets_BT[0, [4, 13]] = True
    module = TrainingModule(make_model(name).double())
    whole = module(tokens_BT, targets_BT, resets_BT)
    first, state = module(tokens_BT[:, :9], targets_BT[:, :9], resets_BT[:, :9], return_state=True)
    second, _ = module(tokens_BT[:, 9:], targets_BT[:, 9:], resets_BT[:, 9:], state=state, return_state=True)
    alone = module(tokens_BT[:, 9:], targets_BT[:, 9:], resets_BT[:, 9:])
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-12)
    assert second.item() != pytest.approx(alone.item(), rel=1e-6)
    assert not any(tensor.requires_grad for block in state for tensor in block)


def test_a_run_that_stops_goes_on_with_the_states_of_its_lanes(tmp_path):
    for name in ("whole", "empty"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name)
    train(configure(tmp_path / "whole", **CARRY))
    train(configure(tmp_path / "empty", training__steps=2, training__validate_every=0))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (9, 10):
        (tmp_path / "stopped" / "run" / "checkpoints" / f"step_{step:08}" / "manifest.json").unlink()
    train(configure(tmp_path / "stopped", **CARRY))
    whole, stopped, empty = (records(tmp_path / name / "run") for name in ("whole", "stopped", "empty"))
    assert stopped == whole
    # The first rows begin documents, the second go on with them.
    assert whole[0]["loss"] == empty[0]["loss"]
    assert whole[1]["loss"] != pytest.approx(empty[1]["loss"], rel=1e-6)


def test_states_return_to_the_rows_of_their_lanes():
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    carried = CarriedStates(True, range(4), 2, world)
    assert carried.before() == [None, None]
    after = [[(torch.tensor([[lane], [lane + 1.0]]),)] for lane in (0.0, 2.0)]
    carried.follow(after, applied=True)
    assert [state[0][0].flatten().tolist() for state in carried.before()] == [[0.0, 1.0], [2.0, 3.0]]
    carried.follow(after, applied=False)
    assert carried.before() == [None, None]


def test_attention_is_refused():
    with pytest.raises(ValueError, match="carry_state is true, but attention keeps the keys and values"):
        check_carry_state(CONFIGS["transformer"])
    hybrid = {"vocab_size": 61, "embedding_dim": 32, "num_blocks": 2, "num_heads": 2}
    with pytest.raises(ValueError, match="choose a model of recurrent blocks alone"):
        check_carry_state(HybridConfig(**hybrid, pattern=["mlstm", "attention"]))
    for name in RECURRENT:
        check_carry_state(CONFIGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_states_saved_by_two_ranks_go_on_in_one(tmp_path, sequence_parallel):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name)
    run_alone("runs", "train", tmp_path / "one", json.dumps(CARRY))
    two = CARRY | {"training__sequence_parallel": sequence_parallel, "deepspeed": {"zero_optimization": {"stage": 2}}}
    run_ranks(2, "runs", "train", tmp_path / "two", json.dumps(two))
    run_dir = tmp_path / "two" / "run"
    found = [records(run_dir)]
    for step in (9, 10):
        (run_dir / "checkpoints" / f"step_{step:08}" / "manifest.json").unlink()
    run_alone("runs", "train", tmp_path / "two", json.dumps(CARRY))
    found.append(records(run_dir))
    expected = records(tmp_path / "one" / "run")
    for run in found:
        for ours, theirs in zip(run, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4), ours["step"]
