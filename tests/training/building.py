"""Weights and peak memory of models that are built for two ranks at each ZeRO stage; a program for torchrun.

Prints a report of rank 0 as JSON.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from xlstm_lm.models import build_model
from xlstm_lm.models.xlstm_config import HybridConfig
from xlstm_lm.parallel.live_bytes import LiveBytes
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training import engine as engine_module
from xlstm_lm.training.build import place_weights, unbuilt_model
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.optimizer import AdamWConfig

MODEL = HybridConfig(
    vocab_size=40, embedding_dim=32, num_blocks=8, pattern=["mlstm", "slstm", "mlstm_paper", "mamba2"] * 2, num_heads=2
)
"""A model whose largest parameter is a small part of it."""


def build(world: World, stage: int, precision: str, tied: bool = False) -> dict[str, object]:
    config = HybridConfig(**{**vars(MODEL), "tie_embeddings": tied})
    torch.manual_seed(7)
    expected = build_model(config)
    drawn_next = torch.rand(3)
    torch.manual_seed(7)
    live, kept = LiveBytes(), 0

    def place_watched(*arguments: Any) -> None:
        with live:
            place_weights(*arguments)
        nonlocal kept
        kept = live.now

    engine_module.place_weights = place_watched
    with live:
        model = unbuilt_model(config)
    engine = TrainingEngine(
        model,
        AdamWConfig(),
        {"zero_optimization": {"stage": stage}},
        world=world,
        precision=precision,
        micro_batch_size=1,
        accumulation_steps=1,
    )
    assert torch.equal(torch.rand(3), drawn_next)  # whatever draws next, such as dropout, draws as before
    parameters = dict(expected.named_parameters())
    rounded = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = dict(engine.state.weights())
    assert weights.keys() == parameters.keys()
    wrong = [
        name for name, value in weights.items() if not torch.equal(value, parameters[name].detach().to(rounded).float())
    ]
    engine.state.load(lambda name, start, stop: parameters[name].float().flatten()[start:stop] + 1, None, 5)
    restored = dict(engine.state.weights())
    assert all(torch.equal(restored[name], value.float() + 1) for name, value in parameters.items())
    engine.close()
    return {"wrong": wrong, "peak": live.peak, "kept": kept}


if __name__ == "__main__":
    world = join_world()
    reference = build_model(MODEL)
    report: dict[str, object] = {
        "bytes": sum(each.nbytes for each in reference.parameters()),
        "largest": max(each.nbytes for each in reference.parameters()),
    }
    for stage in (0, 1, 3):
        report[f"stage {stage}, fp32"] = build(world, stage, "fp32")
    for stage in (2, 3):
        report[f"stage {stage}, bf16, tied"] = build(world, stage, "bf16", tied=True)
    if world.is_first:
        print(json.dumps(report))
