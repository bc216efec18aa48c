"""The recipes in configs/train: short, valid, within the memory of the hardware that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from xlstm_lm.models import build_model
from xlstm_lm.models.accounting import parameter_shapes
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training import memory
from xlstm_lm.training.config import split_batch
from xlstm_lm.training.run_config import load_run_config

GIB = 2**30
RECIPES = sorted((Path(__file__).parents[1] / "configs" / "train").glob("*.yaml"))
HARDWARE = {
    "one-gpu-165m": {"nodes": 1, "gpus": 1, "gpu_gb": 24, "host_gb": 32},
    "node-400m": {"nodes": 1, "gpus": 8, "gpu_gb": 80, "host_gb": 256},
    "cluster-1.3b": {"nodes": 4, "gpus": 8, "gpu_gb": 80, "host_gb": 512},
    "cluster-7b": {"nodes": 32, "gpus": 8, "gpu_gb": 80, "host_gb": 1024},
}
TOKENS = {
    "demo": 3.5e6,
    "shakespeare": 9.83e6,
    "wikitext2": 9.83e6,
    "one-gpu-165m": 3.3e9,
    "node-400m": 15e9,
    "cluster-1.3b": 199e9,
    "cluster-7b": 2.3e12,
}
ACTIVATION_BYTES = 51
"""Kept for a token and a unit of width in each block of xLSTM-7B, in bf16."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_last_as_long_as_they_say(path):
    assert len(path.read_text().splitlines()) <= 40
    run = load_run_config([path])
    run.schedule.check_steps(run.training.steps)
    tokens = run.training.steps * run.data.global_batch_size * run.data.context_length
    assert tokens == pytest.approx(TOKENS[path.stem], rel=0.01)
    for number in re.findall(r"steps: \d+ # of ([\d,]+) tokens", path.read_text()):
        assert run.data.global_batch_size * run.data.context_length == int(number.replace(",", ""))
    assert sorted(TOKENS) == sorted(each.stem for each in RECIPES)


@pytest.mark.parametrize("name", HARDWARE)
def test_recipes_fit_the_hardware_that_they_name(name, monkeypatch):
    path = next(path for path in RECIPES if path.stem == name)
    hardware, run = HARDWARE[name], load_run_config([path])
    head = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    nodes = f"{hardware['nodes']} node" if hardware["gpus"] > 1 else ""
    assert nodes in head and f"{hardware['gpus']} GPU" in head and f"of {hardware['gpu_gb']} GB" in head

    processes = hardware["nodes"] * hardware["gpus"]
    rows, _ = split_batch(run.data.global_batch_size, processes, run.training.micro_batch_size)
    world = World(rank=0, size=processes, local_rank=0, device=torch.device("cuda", 0))
    sizes = {"cuda": hardware["gpu_gb"] * 10**9, "cpu": hardware["host_gb"] * 10**9}
    monkeypatch.setattr(memory, "memory_bytes", lambda device: sizes[device.type])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(hardware["gpus"]))
    memory.check_memory(run, world, "bf16", rows)

    # That check counts the least of all that is kept; this estimate leaves a tenth for buffers and fragments.
    parameters = sum(shape.numel() for shape in parameter_shapes(run.model).values())
    shared = {1: processes, 2: processes}[run.deepspeed["zero_optimization"]["stage"] or 1]
    gradients = 4 * parameters / (processes if run.deepspeed["zero_optimization"]["stage"] == 2 else 1)
    fixed = 2 * parameters + gradients + 12 * parameters / shared
    tokens = rows * run.data.context_length
    kept = ACTIVATION_BYTES * run.model.embedding_dim * tokens
    blocks = run.model.num_blocks
    if run.training.activation_checkpointing:
        activations = kept + 2 * run.model.embedding_dim * tokens * blocks
    else:
        activations = kept * blocks
    assert fixed + activations < 0.9 * sizes["cuda"], (fixed / GIB, activations / GIB)


@pytest.mark.parametrize("name", ["demo", *HARDWARE])
def test_their_models_can_be_built(name):
    run = load_run_config([next(path for path in RECIPES if path.stem == name)])
    with torch.device("meta"):
        model = build_model(run.model)
    assert len(model.no_decay_parameter_names()) > run.model.num_blocks
    assert model.head.weight.shape == (run.model.vocab_size, run.model.embedding_dim)


@pytest.mark.parametrize(
    "path", sorted((RECIPES[0].parents[1] / "deepspeed").glob("*.yaml")), ids=lambda path: path.stem
)
def test_deepspeeds_files_leave_no_dangerous_default(path):
    section = yaml.safe_load(path.read_text())["deepspeed"]
    zero = section["zero_optimization"]
    assert section["communication_data_type"] == "fp32"
    assert zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] > 0
    assert zero["prefetch_bucket_size" if zero["stage"] == 3 else "allgather_bucket_size"] > 0
