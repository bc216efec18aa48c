"""Collectives of a step in bf16 on two ranks at ZeRO stages 1, 2 and 3; a program for torchrun.

Prints, for each stage and communication_data_type, the types that gradients are reduced in.
"""

from __future__ import annotations

import json

import torch

from tests.training.equivalence import batches, build_engine, engine_step
from xlstm_lm.parallel.collectives import CountCollectives
from xlstm_lm.parallel.process_group import World, join_world

PARAMETERS = 216
"""Elements of the model's smallest partition, below which an all-reduce is one of a norm or of flags."""


def reduced_types(world: World, stage: int, section: dict[str, str]) -> list[str]:
    _, engine = build_engine(world, stage, precision="bf16", section=section)
    with CountCollectives() as seen:
        # Norms by layer would collect whole gradients once more, in float32.
        engine_step(world, engine, batches()[0], 0, by_layer=False)
    engine.close()
    sizes = {torch.float32: 4, torch.bfloat16: 2}
    return sorted(
        str(collective.dtype)
        for collective, amount in seen.amounts.items()
        if collective.kind in ("all-reduce", "reduce-scatter", "reduce")
        and amount.bytes / sizes.get(collective.dtype, 8) > PARAMETERS
    )


if __name__ == "__main__":
    world = join_world()
    found = {
        f"stage {stage}, {dtype or 'default'}": reduced_types(
            world, stage, {"communication_data_type": dtype} if dtype else {}
        )
        for stage in (1, 2, 3)
        for dtype in ("", "bf16")
    }
    if world.is_first:
        print(json.dumps(found))
