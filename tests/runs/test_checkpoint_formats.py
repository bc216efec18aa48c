"""Checkpoints are read by the reader of the format that their manifest names."""

from __future__ import annotations

import json

import pytest
import torch

from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs import checkpoint as checkpoint_module
from xlstm_lm.runs.checkpoint import Checkpoint, damage, read_checkpoint, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(
        tmp_path,
        world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
        state={"step": 3},
        sizes={"a": 2},
        weights=iter([("a", torch.ones(2))]),
        moments=None,
        config_yaml="model: {family: xlstm}\n",
        save_tokenizer=lambda place: place.mkdir(),
        keep=1,
    )


def test_each_format_has_its_reader(folder, monkeypatch):
    class Renamed(Checkpoint):
        def all_weights(self):
            return {f"new.{name}": tensor for name, tensor in super().all_weights().items()}

    assert read_checkpoint(folder).all_weights().keys() == {"a"}
    monkeypatch.setitem(checkpoint_module.READERS, 1, Renamed)
    assert read_checkpoint(folder).all_weights().keys() == {"new.a"}
    assert checkpoint_module.FORMAT in checkpoint_module.READERS


def test_an_unknown_format_is_refused_by_name(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    problem = f"{folder} has checkpoint format 2, but this version of xlstm-lm reads format 1."
    assert damage(folder) == problem
    with pytest.raises(ValueError) as refused:
        read_checkpoint(folder)
    assert str(refused.value) == problem
