"""A run that starts from imported weights: exactly those, at every ZeRO stage, with moments and data of its own."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import yaml

from tests.training.processes import run_ranks
from tests.training.runs import configure, records, write_text
from xlstm_lm.base.run_layout import checkpoint_folders
from xlstm_lm.data import train_bpe
from xlstm_lm.hub import import_run, load
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.training.layout import check_layout
from xlstm_lm.training.loop import train
from xlstm_lm.training.stop_request import StopRequest
from xlstm_lm.training.trainer import Trainer

SHORT = {"training__steps": 2, "training__validate_every": 0, "training__gate_statistics_every": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, a run on it in `old`, and `imported`, made of that run."""
    folder = tmp_path_factory.mktemp("imported")
    write_text(folder)
    train(configure(folder, training__run_dir=str(folder / "old"), **(SHORT | {"training__steps": 8})))
    import_run(folder / "old", folder / "imported")
    return folder


@pytest.fixture
def imported(folder, tmp_path):
    """A copy to train in."""
    import_run(folder / "old", tmp_path / "imported")
    return tmp_path / "imported"


def start(folder, run_dir, **overrides):
    return configure(folder, training__run_dir=str(run_dir), training__seed=5, **(SHORT | overrides))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_step_begins_with_the_weights(folder, imported, stage):
    run = start(folder, imported, deepspeed={"zero_optimization": {"stage": stage}})
    with StopRequest() as stop_request, contextlib.ExitStack() as resources:
        trainer = Trainer(run, join_world(), check_layout(run, join_world(), "fp32"), stop_request, resources)
        weights, moments = dict(trainer.engine.state.weights()), dict(trainer.engine.state.moments())
        assert trainer.engine.optimizer_steps == 0 and trainer.step == 0
    expected = dict(load(folder / "old").model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not any(value.any() for value in moments.values())


def test_two_processes_train_on_as_one_does(folder, imported, tmp_path):
    train(start(folder, imported))
    pair = tmp_path / "pair"
    import_run(folder / "old", pair)
    overrides = SHORT | {
        "training__run_dir": str(pair),
        "training__seed": 5,
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    run_ranks(2, "runs", "train", folder, json.dumps(overrides))
    ours, theirs = records(imported), records(pair)
    assert [each["step"] for each in theirs] == [each["step"] for each in ours]
    for one, two in zip(ours, theirs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    (folder / "fresh").mkdir()
    train(start(folder, folder / "fresh"))
    assert ours[0]["loss"] < records(folder / "fresh")[0]["loss"] - 0.01  # it has learned something before


def test_the_run_goes_on_from_its_own_checkpoints(folder, imported):
    train(start(folder, imported, training__keep_checkpoints=1))
    assert list(checkpoint_folders(imported)) == [2]
    train(start(folder, imported, training__steps=3, training__keep_checkpoints=1))
    import_run(folder / "old", imported.parent / "whole")
    train(start(folder, imported.parent / "whole", training__steps=3))
    assert records(imported)[-2]["loss"] == records(imported.parent / "whole")[-2]["loss"]


def test_another_run_may_start_from_it(folder, imported, tmp_path):
    train(start(folder, tmp_path / "branch", training__resume=str(folder / "imported")))
    train(start(folder, imported))
    assert records(tmp_path / "branch") == records(imported)
    assert list(checkpoint_folders(folder / "imported")) == [0]


def test_before_the_first_step_everything_but_the_model_may_change(folder, imported):
    run = start(folder, imported, training__resume="never")
    with StopRequest() as stop_request, contextlib.ExitStack() as resources:
        Trainer(run, join_world(), check_layout(run, join_world(), "fp32"), stop_request, resources)
    assert yaml.safe_load((imported / "config.yaml").read_text())["optimizer"]["learning_rate"] == 0.01
    train(start(folder, imported, optimizer__learning_rate=0.005, data__context_length=8))
    with pytest.raises(ValueError, match=r"another configuration:\n  optimizer.learning_rate: 0.005 there, 0.01 now"):
        train(start(folder, imported, data__context_length=8))


def test_another_model_or_tokenizer_is_refused(folder, imported, tmp_path):
    with pytest.raises(
        ValueError, match=r"imported model, which is not .*\n  model.num_heads: 2 there, 4 now\n.*model.yaml"
    ):
        train(start(folder, imported, model__num_heads=4))
    train_bpe([str(folder / "train.txt")], vocab_size=257, out=tmp_path / "bpe")
    import_run(folder / "old", tmp_path / "with_bpe", tokenizer=str(tmp_path / "bpe"))
    with pytest.raises(ValueError, match="trained with another tokenizer than data.tokenizer: give the recipe"):
        train(start(folder, tmp_path / "with_bpe"))
