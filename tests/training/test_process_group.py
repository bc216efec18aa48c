"""Processes find each other, and part in peace."""

from __future__ import annotations

import pytest
import torch

from tests.training.processes import launch_ranks, run_ranks
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.parallel.process_group import World, lost_processes_explained


def test_leaving_right_after_a_collective_does_not_abort():
    for _ in range(3):  # one in three would have gone well without the wait
        launch_ranks(2, "leaving")


def test_an_axis_sums_over_its_own_processes():
    assert run_ranks(3, "axes").strip() == str([(0, 11, 111, 111), (1, 11, 111, 111), (0, 100, 111, 111)])


def test_a_process_that_is_gone_ends_the_others_with_a_message():
    printed = launch_ranks(2, "losing")
    assert "RunError: lost the connection to another of the 2 processes" in printed
    assert printed.count("\n") < 5


def test_other_errors_are_left_as_they_are():
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="a bug") as raised, lost_processes_explained(world):
        raise RuntimeError("a bug")
    assert not isinstance(raised.value, RunError)
