"""Live bytes of real steps beside the bytes of the model of memory; a program for one process or for torchrun.

Arguments are cases, STAGE:PRECISION:FAMILY:ROWS:MICRO_BATCHES:CHECKPOINTING. Prints, for each case, the peak of the
live tensors, from the building of the engine to the second step, and the planned peak, in JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch

from xlstm_lm.parallel.live_bytes import LiveBytes
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training.build import unbuilt_model
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.memory import elements_of
from xlstm_lm.training.memory_model import RankLayout, memory_plan
from xlstm_lm.training.run_config import RunConfig, load_run_config

LENGTH = 256
SIZES = {"embedding_dim": 512, "num_blocks": 6, "num_heads": 4, "vocab_size": 8192}
FAMILIES: dict[str, dict[str, Any]] = {
    "xlstm": SIZES,
    "transformer": SIZES | {"family": "transformer"},
    "mamba": {"family": "mamba", "embedding_dim": 512, "num_blocks": 10, "vocab_size": 8192},
}
"""Models of 20 million parameters and more."""


def run_of(family: str, stage: int) -> RunConfig:
    """A run of a family's model, with buckets that are smaller than the model."""
    zero = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
    if stage == 3:
        zero["prefetch_bucket_size"] = 2_000_000
    return load_run_config([], {"model": FAMILIES[family], "data": {}, "deepspeed": {"zero_optimization": zero}})


def live_peak(run: RunConfig, world: World, layout: RankLayout) -> int:
    """Most bytes alive while an engine is built and takes two steps."""
    torch.manual_seed(0)
    model = unbuilt_model(run.model)
    model.activation_checkpointing = layout.checkpointing
    rows = [torch.randint(0, run.model.vocab_size, (layout.rows, LENGTH)) for _ in range(layout.micro_batches)]
    batches = [(each, each.roll(-1, 1), torch.zeros_like(each, dtype=torch.bool)) for each in rows]
    with LiveBytes() as live:
        engine = TrainingEngine(
            model,
            run.optimizer,
            run.deepspeed,
            world=world,
            precision=layout.precision,
            micro_batch_size=layout.rows,
            accumulation_steps=layout.micro_batches,
        )
        gc.collect()
        for _ in range(2):
            engine.train_step(batches, 1 / (layout.tokens * layout.micro_batches), 1e-4)
            gc.collect()
    engine.close()
    del engine, model
    gc.collect()
    return live.peak


def compare(world: World, case: str) -> dict[str, Any]:
    """Live and planned bytes of one case."""
    stage, precision, family, rows, micro_batches, checkpointing = case.split(":")
    run = run_of(family, int(stage))
    layout = RankLayout(
        stage=int(stage),
        processes=world.size,
        precision="bf16" if precision == "bf16" else "fp32",
        rows=int(rows),
        micro_batches=int(micro_batches),
        context_length=LENGTH,
        checkpointing=checkpointing == "1",
        device="cpu",
        zero=run.deepspeed["zero_optimization"],
    )
    elements = elements_of(run)
    plan = memory_plan(run.model, elements, layout)
    found = {"parameters": elements.parameters, "live": live_peak(run, world, layout), "planned": plan.peak}
    return found | {"held": sum(plan.held.values()), "phase": plan.phase, "items": plan.items}


if __name__ == "__main__":
    world = join_world()
    results = {case: compare(world, case) for case in sys.argv[1:]}
    if world.is_first:
        print(json.dumps(results))
