"""A dry run shows what a rank of a layout holds and sends, and refuses what the layout cannot train."""

from __future__ import annotations

import json
import math
import re

import pytest

from tests.training.dry_runs import fields
from tests.training.processes import run_alone
from xlstm_lm.models.accounting import count_parameters, parameter_shapes
from xlstm_lm.training import dry_run as dry_run_module
from xlstm_lm.training.dry_run import dry_run
from xlstm_lm.training.run_config import load_run_config

STAGES = ("0:fp32", "1:bf16", "2:bf16", "3:bf16")


def test_the_sizes_that_are_printed_are_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(run_alone("dry_runs", "2:bf16", "2:fp32", "2:bf16:4").splitlines()[-1])
    parameters = count_parameters(load_run_config([], fields()).model)
    for name, bytes_each in (("2:bf16", 2), ("2:fp32", 4)):
        text = "\n".join(found[name])
        assert f"256 processes, ZeRO 2, {name[2:]}. This shows" in text
        assert held(text, "weights") == pytest.approx(bytes_each * parameters, rel=0.01)
        # AdamW has two numbers in float32 for each weight; a rank's share is rounded up to whole alignments.
        assert held(text, "optimizer state") == pytest.approx(8 * parameters / 256, rel=0.2)
        assert held(text, "master weights") == pytest.approx(4 * parameters / 256, rel=0.2)
        sent = dict(collective(line) for line in found[name] if line.startswith("  "))
        assert sent["all-reduce", "float32"] >= 2  # one in each micro batch
        assert ("all-gather", {"bf16": "bfloat16", "fp32": "float32"}[name[2:]]) in sent
    divided = "\n".join(found["2:bf16:4"])
    assert "8 lanes a rank; 1 row of 64 tokens a micro batch, 8 of them" in divided
    assert "Each row is divided over 4 processes" in divided and "activations of 1 row of 16 tokens" in divided
    assert len(found["2:bf16:4"]) > len(found["2:bf16"]) + 1, "the exchanges of states are collectives of their own"


@pytest.mark.slow
def test_a_step_of_256_processes_at_every_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(run_alone("dry_runs", *STAGES).splitlines()[-1])
    assert not list(tmp_path.iterdir())  # no run folder, no data
    assert "prefetch" in found.pop("refused")
    run = load_run_config([], fields())
    parameters = count_parameters(run.model)
    shared = sum(2 * math.ceil(shape.numel() / 256) for shape in parameter_shapes(run.model).values())
    found = {name[0]: lines for name, lines in found.items()}
    for stage, lines in found.items():
        text = "\n".join(lines)
        assert lines[0].startswith(f"256 processes, ZeRO {stage}, ")
        assert "rank 0 only" in lines[0]
        assert "2 lanes a rank; 1 row of 8 tokens a micro batch, 2 of them" in text
        whole = parameters * (4 if stage == "0" else 2)
        assert held(text, "weights") == pytest.approx(shared if stage == "3" else whole, rel=0.01)
        assert held(text, "optimizer state") == pytest.approx(8 * parameters / (256 if stage > "0" else 1), rel=0.6)
    sent = {stage: dict(collective(line) for line in lines if line.startswith("  ")) for stage, lines in found.items()}
    # Stage 0 sums once a step, stages 2 and 3 in each micro batch; stage 3 collects weights as they are used.
    assert sent["0"] == {("all-reduce", "float32"): 1}
    assert set(sent["1"]) == {("all-reduce", "float32"), ("all-gather", "bfloat16")}
    assert sent["2"]["all-reduce", "float32"] >= 2
    assert sent["3"]["reduce-scatter", "float32"] == 2
    assert sent["3"]["all-gather", "bfloat16"] > sent["1"]["all-gather", "bfloat16"]


def collective(line: str) -> tuple[tuple[str, str], int]:
    """Kind and type of a line's collective, and its number of calls."""
    calls, kind, dtype, *_ = line.split()
    return (kind, dtype), int(calls)


def held(text: str, what: str) -> float:
    """Bytes of `what` in the line of what is held."""
    number, unit = re.search(rf"Held after a step: .*?(?<!master )\b{what} ([\d.,]+) (\w+)", text).groups()
    return float(number.replace(",", "")) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20}[unit]


@pytest.mark.parametrize(
    ("processes", "overrides", "message"),
    [
        (0, {}, "--dry-run is 0"),
        (96, {}, "which 96 processes cannot share evenly"),
        (256, {"training__sequence_parallel": 3}, "does not divide the 256 processes"),
        (256, {"training__sequence_parallel": 4}, "which leaves slices of 2 tokens"),
        (256, {"training__micro_batch_size": 3}, "does not divide the 2 rows"),
        (256, {"optimizer": {"kind": "muon"}, "deepspeed": {"zero_optimization": {"stage": 3}}}, "[Mm]uon"),
        (256, {"training__steps": 3, "schedule__warmup": 5}, "warm"),
        (
            256,
            {"schedule": {"kind": "constant", "warmup": 0}, "training__steps": 3, "profile__steps": "2:4"},
            "profile.steps is",
        ),
        (256, {"deepspeed": {"elasticity": {}}}, "deepspeed.elasticity is not set there"),
        (256, {"deepspeed": {"zero_optimisation": {"stage": 3}}}, "zero_optimization"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_built(processes, overrides, message, monkeypatch):
    monkeypatch.setattr(dry_run_module, "_step", lambda *_: pytest.fail("the step was run"))
    with pytest.raises(ValueError, match=message):
        dry_run(load_run_config([], fields(**overrides)), processes)


def test_a_model_that_this_machine_cannot_hold_is_described_and_not_built(monkeypatch):
    monkeypatch.setattr(dry_run_module, "_step", lambda *_: pytest.fail("the step was run"))
    monkeypatch.setattr(dry_run_module, "memory_bytes", lambda device: 1000)
    lines = dry_run(load_run_config([], fields()), 256)
    assert "The step was not run" in lines[-1] and "1,000 bytes" in lines[-1]
    assert any(line.startswith("At least, a rank: weights") for line in lines)
