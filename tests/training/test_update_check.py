"""A vetoed update leaves nothing behind, at every ZeRO stage, with the same verdict on all ranks."""

from __future__ import annotations

import json

import pytest

from tests.training.processes import run_ranks
from tests.training.vetoing import CELLS, veto
from xlstm_lm.parallel.process_group import join_world


@pytest.mark.parametrize("name", CELLS)
def test_a_vetoed_update_changes_no_bit(name):
    assert veto(join_world(), name) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vetoed_update_changes_no_bit_on_any_rank(ranks):
    report = json.loads(run_ranks(ranks, "vetoing").splitlines()[-1])
    assert report == {name: [[]] * ranks for name in CELLS}
