"""Which parameters decay, and how a batch is split."""

from __future__ import annotations

import pytest

from tests.training.tiny import TinyModel
from xlstm_lm.training.config import TrainingConfig, split_batch
from xlstm_lm.training.optimizer import AdamWConfig, build_optimizer


def test_matrices_decay_and_nothing_else_does():
    model = TinyModel()
    config = AdamWConfig(weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7)
    adamw = build_optimizer(config, model.named_parameters(), model.no_decay_parameter_names())
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = (({names[each] for each in group["params"]}, group["weight_decay"]) for group in adamw.param_groups)
    assert decayed == ({"up.weight", "down.weight", "head.weight"}, 0.3)
    assert kept == ({"embedding.weight", "norm.weight", "norm.bias", "up.bias", "down.bias"}, 0.0)
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 for group in adamw.param_groups)


def test_a_tied_head_is_one_parameter():
    model = TinyModel(tied=True)
    adamw = build_optimizer(AdamWConfig(), model.named_parameters(), model.no_decay_parameter_names())
    assert sum(len(group["params"]) for group in adamw.param_groups) == 7


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no_decay_parameter_names\(\) names \['heat'\]"):
        build_optimizer(AdamWConfig(), TinyModel().named_parameters(), {"heat"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a number above 0"),
        ({"gradient_clip": -1.0}, "gradient_clip is -1.0; it must be a number from 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdamWConfig(**values)


def test_a_batch_is_split_over_ranks_and_micro_batches():
    assert split_batch(32, 4, None) == (8, 1)
    assert split_batch(32, 4, 2) == (2, 4)
    with pytest.raises(ValueError, match=r"global_batch_size is 32, which 3 processes cannot share evenly"):
        split_batch(32, 3, None)
    with pytest.raises(ValueError, match=r"global_batch_size is 2, which 4 processes cannot share"):
        split_batch(2, 4, None)
    with pytest.raises(ValueError, match=r"micro_batch_size is 3, .* choose one of \[1, 2, 4, 8\]"):
        split_batch(32, 4, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "training.steps is 0; it must be a whole number from 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0; it must be a whole number from 1"),
        ({"validate_every": -1}, "validate_every is -1; it must be a whole number from 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; it must be a whole number from 1 to .* or null"),
        ({"run_dir": ""}, "run_dir is empty"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)
