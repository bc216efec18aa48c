"""A run that cannot fit in memory is refused before anything is built; an error of allocation names remedies."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from xlstm_lm.base import machine
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.parallel.process_group import World
from xlstm_lm.training import loop, memory, out_of_memory, profile
from xlstm_lm.training.memory import check_memory
from xlstm_lm.training.out_of_memory import memory_errors_explained, remedies
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
    run = run_of(training__micro_batch_size=2)
    with pytest.raises(RunError, match=message), memory_errors_explained(run, CPU, "fp32", 2):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RunError, match="Out of memory"), memory_errors_explained(run_of(), CPU, "fp32", 8):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="another"), memory_errors_explained(run_of(), CPU, "fp32", 8):
        raise RuntimeError("another")


def advice(monkeypatch, gigabytes: float, rows: int = 8, size: int = 8, **overrides) -> list[str]:
    """First words of each remedy on a GPU of that size."""
    monkeypatch.setattr(out_of_memory, "memory_bytes", lambda device: int(gigabytes * 2**30))
    world = World(rank=0, size=size, local_rank=0, device=torch.device("cuda", 0))
    return [each.split(" (")[0] for each in remedies(run_of(**overrides), world, "bf16", rows)]


def test_the_most_useful_settings_come_first_and_none_that_is_set(monkeypatch):
    stage = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    activations = [
        "training.activation_checkpointing true",
        "training.micro_batch_size 4 instead of 8",
        "data.context_length 512 instead of 1,024",
    ]
    state = [
        "deepspeed.zero_optimization.stage 3 instead of 2",
        "deepspeed.zero_optimization.offload_optimizer.device cpu",
        "more processes than 8, which share 0.2 GiB of optimizer and gradients",
    ]
    values = {"data__context_length": 1024} | stage
    large = advice(monkeypatch, 80, **values)
    assert large[:3] == activations and large[3:5] == state[:2] and large[-1].startswith("a smaller model")
    assert advice(monkeypatch, 0.1, **values)[:2] == state[:2]
    values |= {"training__activation_checkpointing": True}
    values["deepspeed"] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    text = " ".join(advice(monkeypatch, 80, rows=1, **values))
    for absent in ("activation_checkpointing", "micro_batch_size", "stage", "offload"):
        assert absent not in text, absent
    assert "more processes than 8" in text
    alone = " ".join(advice(monkeypatch, 80, size=1))
    assert "stage 2 instead" not in alone and "more processes than 1" in alone
    muon = " ".join(advice(monkeypatch, 80, optimizer__kind="muon", **stage))
    assert "stage 3" not in muon, "Muon cannot be divided by stage 3"


def test_amounts_of_the_bound_are_named(monkeypatch):
    monkeypatch.setattr(out_of_memory, "memory_bytes", lambda device: 2**40)
    world = World(rank=0, size=4, local_rank=0, device=torch.device("cuda", 0))
    run = run_of(deepspeed={"zero_optimization": {"stage": 1}})
    gradients = 2 * count_parameters(run.model)
    found = remedies(run, world, "bf16", 2)
    expected = f"stage 2 instead of 1 (gradients: {gradients / 2**30:,.1f} GiB become {gradients / 4 / 2**30:,.1f})"
    assert any(each.endswith(expected) for each in found)


def test_a_snapshot_of_memory_is_written_on_a_gpu_when_asked_for(monkeypatch, tmp_path):
    gpu = World(rank=3, size=4, local_rank=3, device=torch.device("cuda", 3))
    recorded = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: recorded.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"x"))
    for memory_is_on, world in ((False, gpu), (True, CPU), (True, gpu)):
        config = profile.ProfileConfig(memory=memory_is_on)
        profile.record_memory(config, world.device)
        path = profile.write_memory_snapshot(config, tmp_path / "profile", world)
        assert (path is not None) == bool(recorded) == (memory_is_on and world is gpu)
    assert path == tmp_path / "profile" / "memory_rank0003.pickle" and path.read_bytes() == b"x"
    again = profile.write_memory_snapshot(config, tmp_path / "profile", gpu)
    assert again.name == "memory_rank0003_2.pickle"
    monkeypatch.setattr(out_of_memory, "memory_bytes", lambda device: 2**40)
    run = run_of(profile={"memory": True})
    with (
        pytest.raises(RunError, match="The allocations are in .*memory_rank0003_3.pickle, for pytorch.org"),
        memory_errors_explained(
            run, gpu, "bf16", 2, lambda: profile.write_memory_snapshot(run.profile, tmp_path / "profile", gpu)
        ),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
