"""Checkpoints are read by the reader of the format that their manifest names."""

from __future__ import annotations

import json

import pytest
import torch

from xlstm_lm.parallel.process_group import World
from xlstm_lm.runs import checkpoint as checkpoint_module
from xlstm_lm.runs.checkpoint import damage, read_checkpoint
from xlstm_lm.runs.checkpoint_format2 import ShardedCheckpoint
from xlstm_lm.runs.checkpoint_layout import Share
from xlstm_lm.runs.checkpoint_writer import FORMAT, Snapshot, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    snapshot = Snapshot(
        state={"step": 3},
        shapes={"model": {"a": (2,)}},
        shares={"model": [Share("a", 0, torch.ones(2))]},
        config_yaml="model: {family: xlstm}\n",
        save_tokenizer=lambda place: place.mkdir(),
        keep=1,
    )
    return write_checkpoint(tmp_path, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")), snapshot)


def test_each_format_has_its_reader(folder, monkeypatch):
    class Renamed(ShardedCheckpoint):
        def all_weights(self):
            return {f"new.{name}": tensor for name, tensor in super().all_weights().items()}

    assert read_checkpoint(folder).all_weights().keys() == {"a"}
    monkeypatch.setitem(checkpoint_module.READERS, 2, Renamed)
    assert read_checkpoint(folder).all_weights().keys() == {"new.a"}
    assert FORMAT in checkpoint_module.READERS


def test_an_unknown_format_is_refused_by_name(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    problem = f"{folder} has checkpoint format 3, but this version of xlstm-lm reads format 1, 2."
    assert damage(folder) == problem
    with pytest.raises(ValueError) as refused:
        read_checkpoint(folder)
    assert str(refused.value) == problem
