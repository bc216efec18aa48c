"""Every key that the section deepspeed allows works, and every key that must not be set is refused by name."""

from __future__ import annotations

import json

import pytest

from tests.training.processes import run_ranks
from tests.training.section_keys import TRIALS, allowed_keys, section_of, section_with
from xlstm_lm.training.deepspeed_section import REFUSED
from xlstm_lm.training.run_config import load_run_config


def test_every_allowed_key_is_tried_and_none_is_refused():
    assert allowed_keys() == set(TRIALS)
    assert not [key for key in TRIALS if key in REFUSED]


@pytest.mark.parametrize("key", TRIALS)
def test_every_allowed_key_is_accepted_in_a_recipe(key):
    for trial in TRIALS[key]:
        section = section_of(key, trial, trial.stages[0])
        assert load_run_config([], {"model": {}, "data": {}, "deepspeed": section}).deepspeed == section


@pytest.mark.parametrize("key", REFUSED)
def test_every_other_key_is_refused_with_its_reason(key):
    with pytest.raises(ValueError) as refused:
        load_run_config([], {"model": {}, "data": {}, "deepspeed": section_with({key: 1})})
    assert f"deepspeed.{key} is not set there: {REFUSED[key]}; remove it." in str(refused.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("comunication_data_type", "communication_data_type"),
        ("zero_optimization.reduce_bucketsize", "zero_optimization.reduce_bucket_size"),
        ("zero_optimization.offload_param.pinned_memory", "zero_optimization.offload_param.pin_memory"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key, nearest):
    with pytest.raises(ValueError, match=f"Did you mean deepspeed.{nearest}"):
        load_run_config([], {"model": {}, "data": {}, "deepspeed": section_with({key: 1})})


@pytest.mark.slow
def test_every_allowed_key_reaches_deepspeed_and_changes_no_loss():
    found = json.loads(run_ranks(2, "section_keys").splitlines()[-1])
    assert len(found) == sum(len(trial.stages) for trials in TRIALS.values() for trial in trials)
    for case, result in found.items():
        assert result["reached"], case
        assert result["difference"] <= result["allowed"], case
