"""Exports of what is trained on many processes, and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hub.lively import make_trained, random_tokens
from xlstm_lm import hub

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_zero_3_run_of_two_processes(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipes = ["configs/train/demo.yaml", "configs/deepspeed/zero3.yaml"]
    settings = {
        "training.run_dir": str(tmp_path / "run"),
        "training.steps": 4,
        "training.checkpoint_every": 2,
        "model.pattern": "mlstm",
        "model.slstm_positions": "null",
        "model.tie_embeddings": "false",
        "model.norm": "rms",
        "model.embedding_dim": 128,
        "model.num_blocks": 2,
        "model.num_heads": 2,
        "data.context_length": 32,
        "data.global_batch_size": 4,
        "data.validation_tokens": 2000,
        "schedule.warmup_steps": 1,
        "schedule.cooldown_steps": 1,
    }
    command = [*launcher, "-m", "xlstm_lm", "train", *(part for recipe in recipes for part in ("--config", recipe))]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for format_name in ("transformers", "xlstm_lm"):
        exported = hub.export(tmp_path / "run", tmp_path / format_name, step=2, format_name=format_name)
        assert exported.difference < 1e-3
        tokens_BT = random_tokens(2, 20)
        with torch.no_grad():
            trained = hub.load(tmp_path / "run" / "checkpoints" / "step_00000002")
            assert torch.equal(hub.load(exported.folder)(tokens_BT), trained(tokens_BT))
    assert "for 2 steps" in (tmp_path / "xlstm_lm" / "README.md").read_text()


@pytest.mark.slow
def test_no_process_holds_the_model_twice(tmp_path):
    trained = make_trained(tmp_path / "source", pattern="mlstm", embedding_dim=2048, num_blocks=2, num_heads=4)
    size = 4 * sum(parameter.numel() for parameter in trained.parameters())
    hub.save_export(trained, tmp_path / "first")
    script = """
import json, resource, sys
import torch, transformers, xlstm_lm.hub as hub
from xlstm_lm.ops.native import load_kernels
load_kernels()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
exported = hub.export(sys.argv[1], sys.argv[2], shard_bytes=2**26)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([after - before, child - before]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "first"), str(tmp_path / "second")]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    own, child = json.loads(finished.stdout.splitlines()[-1])
    assert size > 350e6
    assert own < 1.5 * size
    assert child < 1.5 * size
