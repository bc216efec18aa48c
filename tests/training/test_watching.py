"""The rank that the others wait for is named; norms by layer are those of a plain model; steps are traced."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.processes import run_ranks
from tests.training.runs import configure, write_text
from tests.training.straggling import SLOWNESS
from xlstm_lm.models import build_model
from xlstm_lm.ops import gpu
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.training import telemetry
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.optimizer import AdamWConfig
from xlstm_lm.training.profile import ProfileConfig, StepProfiler, new_file
from xlstm_lm.training.stragglers import summary


def test_a_slow_rank_of_two_is_named_and_each_rank_writes_a_trace(tmp_path):
    write_text(tmp_path)
    run_ranks(2, "straggling", tmp_path)
    for stage in (0, 3):
        lines = (tmp_path / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
        train = [record for record in map(json.loads, lines) if record["split"] == "train"]
        for record in train[1:]:  # the first step also sets up what the others reuse
            assert (record["slowest_rank"], record["slowest_host"]) == (1, "node1"), stage
            slowest = record["ranks/seconds_to_first_collective_max"]
            assert slowest >= SLOWNESS > slowest - record["ranks/seconds_to_first_collective_min"] - 0.1
            assert slowest - record["ranks/seconds_to_first_collective_min"] > SLOWNESS / 2
            assert record["ranks/seconds_to_first_collective_median"] < slowest
            assert 0 < record["ranks/communication_share"] < 1 and record["memory_bytes"] == 1001
            assert record["ranks/data_wait_seconds_max"] >= record["ranks/data_wait_seconds_min"] >= 0
        for step in (2, 4):
            names = {name for name in train[step - 1] if name.startswith("layers/")}
            layers = {f"layers/{name}/gradient_norm" for name in ("embedding", "0", "1", "final_norm", "head")}
            assert names == layers | {f"layers/{index}/activation_norm" for index in range(2)}
            assert "gates/forget_gate" in train[step - 1] and not any("layers/" in name for name in train[step - 2])
        profile = tmp_path / f"stage{stage}" / "profile"
        names = {f"trace_steps_2-3_rank000{rank}.json" for rank in range(2)}
        assert names | {name.replace("trace", "operations").replace("json", "txt") for name in names} == {
            path.name for path in profile.iterdir()
        }
        events = json.loads((profile / "trace_steps_2-3_rank0001.json").read_text())["traceEvents"]
        assert any("gloo" in str(event.get("name")) or "c10d" in str(event.get("name")) for event in events)
    first, last = (
        json.loads((tmp_path / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()[1]) for stage in (0, 3)
    )
    for name in first:
        if name.startswith("layers/"):
            assert first[name] == pytest.approx(last[name], rel=1e-4), name


def test_ranks_are_summarized():
    numbers = ((0.1, 0.0, 5), (0.2, 0.4, 9), (0.5, 0.0, 7))
    ranks = [
        {
            "rank": rank,
            "host": f"node{rank}",
            "seconds_to_first_collective": work,
            "data_wait_seconds": wait,
            "communication_share": None,
            "memory_bytes": memory,
        }
        for rank, (work, wait, memory) in enumerate(numbers)
    ]
    found = summary(ranks)
    assert found["ranks/seconds_to_first_collective_median"] == 0.2 and found["memory_bytes"] == 9
    assert found["slowest_rank"] == 1, "waiting for data holds the others back as well"
    assert "ranks/communication_share" not in found and summary([]) == {}
    alone = summary([ranks[0] | {"seconds_to_first_collective": None}])
    assert "slowest_rank" not in alone and "ranks/seconds_to_first_collective_min" not in alone


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_norms_are_those_of_a_plain_model(stage, tmp_path):
    write_text(tmp_path)
    config = configure(tmp_path).model
    torch.manual_seed(0)
    model = build_model(config)
    plain = build_model(config)
    plain.load_state_dict(model.state_dict())
    model.activation_checkpointing = True
    world = join_world()
    section = {"zero_optimization": {"stage": stage}}
    sizes = {"world": world, "precision": "fp32", "micro_batch_size": 2, "accumulation_steps": 1}
    engine = TrainingEngine(model, AdamWConfig(), section, **sizes)
    tokens_BT = torch.randint(0, 257, (2, 16))
    resets_BT = torch.zeros(2, 16, dtype=torch.bool)
    found = engine.statistics((tokens_BT, tokens_BT, resets_BT))
    outputs = []
    for block in plain.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    gates = plain.gate_statistics(tokens_BT, resets_BT)
    assert found.keys() == {f"gates/{name}" for name in gates} | {f"layers/{i}/activation_norm" for i in range(2)}
    for index, output_BTD in enumerate(outputs):
        expected = output_BTD.square().sum(-1).sqrt().mean()
        torch.testing.assert_close(found[f"layers/{index}/activation_norm"], expected)
    engine.close()


def test_the_peak_is_that_of_the_type_that_products_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    before = torch.get_float32_matmul_precision()
    device = torch.device("cuda", 0)
    for precision, setting, peak in (("bf16", "highest", 989e12), ("fp32", "highest", 67e12), ("fp32", "high", 495e12)):
        torch.set_float32_matmul_precision(setting)
        assert telemetry.peak_flops(device, precision) == peak
    for each in gpu.GPUS:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=each.name: name)
        assert telemetry.peak_flops(device, "bf16") == each.bf16_flops
        assert telemetry.peak_flops(device, "fp32") == (each.tf32_flops or each.fp32_flops)
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("steps", ["20", "0:3", "5:4", "1:101", "a:b", "1:2:3", ""])
def test_a_wrong_range_of_steps_is_named(steps):
    with pytest.raises(ValueError, match=rf"profile.steps is '{steps}'; it must be 'FIRST:LAST', such as '20:24'"):
        ProfileConfig(steps=steps)


def test_a_range_beyond_the_run_is_named_and_nothing_is_overwritten(tmp_path):
    ProfileConfig(steps="20:24").check_steps(24)
    with pytest.raises(ValueError, match="profile.steps is 20:24, but the run has 23 steps"):
        ProfileConfig(steps="20:24").check_steps(23)
    said = []
    for config in (ProfileConfig(), ProfileConfig(steps="2:3")):
        profiler = StepProfiler(config, tmp_path / "profile", join_world(), said.append)
        for step in range(1, 3):
            profiler.before(step)
            torch.ones(3) + 1
            profiler.after(step)
        profiler.close(2)
        assert (tmp_path / "profile").exists() == bool(said) == bool(config.steps)
    assert "aten::add" in said[0] and "Traces of steps 2 to 2, " in said[0]
    assert new_file(tmp_path / "profile", "trace_steps_2-2_rank0000", ".json").stem == "trace_steps_2-2_rank0000_2"
