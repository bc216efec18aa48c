"""A vetoed update leaves nothing behind, at every ZeRO stage, with the same verdict on all ranks."""

from __future__ import annotations

import json

import pytest

from tests.training.processes import run_ranks
from tests.training.vetoing import CELLS, veto
from xlstm_lm.parallel.process_group import join_world

QUICK = ("stage 0, fp32", "stage 1, bf16", "stage 2, fp32", "stage 2, offloaded", "stage 3, fp32", "stage 2, muon")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CELLS])
def test_a_vetoed_update_changes_no_bit_and_costs_no_wait(name):
    assert veto(join_world(), name) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vetoed_update_changes_no_bit_on_any_rank(ranks):
    report = json.loads(run_ranks(ranks, "vetoing").splitlines()[-1])
    assert report == {name: [[]] * ranks for name in CELLS}
