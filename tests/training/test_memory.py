"""A run that cannot fit in memory is refused before anything is built; an error of allocation names remedies."""

from __future__ import annotations

import time

import pytest
import torch

from xlstm_lm.base import machine
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training import loop, memory
from xlstm_lm.training.memory import check_memory, memory_errors_explained
from xlstm_lm.training.run_config import load_run_config

CPU = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def run_of(**overrides):
    return load_run_config(
        [], {"model": {}, "data": {}, **{name.replace("__", "."): value for name, value in overrides.items()}}
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__vocab_size": 2**31 - 1},
        {"model__embedding_dim": 2**20, "model__num_blocks": 4096, "model__qk_dim_factor": 1024},
        {"model__family": "mamba", "model__embedding_dim": 2**20, "model__expand": 1024, "model__num_blocks": 4096},
        {"model__family": "lstm", "model__embedding_dim": 2**20, "model__num_blocks": 4096},
        {"model__family": "transformer", "model__embedding_dim": 2**20, "model__num_heads": 16},
        {"data__context_length": 2**30},
        {"data__global_batch_size": 2**20},
    ],
)
def test_absurd_sizes_are_refused_at_once_and_before_anything_is_written(overrides, tmp_path):
    run = run_of(**overrides, training__run_dir=str(tmp_path / "run"))
    began = time.process_time()
    with pytest.raises(
        ValueError, match=r"The model has [\d,]+ parameters; .* needs at least [\d,.]+ GiB \(.*machine has"
    ):
        loop.train(run)
    assert time.process_time() - began < 5
    assert not (tmp_path / "run").exists()


def test_weights_gradients_moments_and_activations_are_counted(monkeypatch):
    run = run_of(model__num_blocks=2, data__global_batch_size=4, data__context_length=64)
    parameters = count_parameters(run.model)
    needed = 16 * parameters + 4 * 64 * 768 * 4 * 3 + 4 * 64 * 17
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed)
    check_memory(run, CPU, "fp32", micro_batch_size=4)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=f"{parameters:,} parameters"):
        check_memory(run, CPU, "fp32", micro_batch_size=4)
    check_memory(run, CPU, "fp32", micro_batch_size=2)


def test_zero_and_offload_share_out(monkeypatch):
    run = run_of(deepspeed={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    parameters = count_parameters(run.model)
    gpu = World(rank=0, size=4, local_rank=0, device=torch.device("cuda", 0))
    sizes = {"cuda": parameters + 2**30, "cpu": 4 * parameters}
    monkeypatch.setattr(memory, "memory_bytes", lambda device: sizes[device.type])
    check_memory(run, gpu, "bf16", micro_batch_size=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="this machine has for 4 processes together"):
        check_memory(run, gpu, "bf16", micro_batch_size=1)
    run.deepspeed["zero_optimization"] = {"stage": 1}
    sizes["cpu"] *= 16
    with pytest.raises(ValueError, match="cuda:0 has"):
        check_memory(run, gpu, "bf16", micro_batch_size=32)


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    whole = machine.memory_bytes(torch.device("cpu"))
    assert whole > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert machine.memory_bytes(torch.device("cpu")) >= whole
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.memory_bytes(torch.device("cpu")) == 1000


def test_an_allocation_that_fails_says_what_needs_less():
    message = r"training.micro_batch_size 2 and .*activation_checkpointing.*can't allocate"
    with pytest.raises(RunError, match=message), memory_errors_explained(run_of(training__micro_batch_size=2)):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RunError, match="Out of memory"), memory_errors_explained(run_of()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="another"), memory_errors_explained(run_of()):
        raise RuntimeError("another")
