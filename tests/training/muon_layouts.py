"""Muon at every ZeRO stage that can hold it, with checkpoints between them; also a program for torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.training.equivalence import compare, compare_with_faults
from tests.training.layouts import continued_run, whole_run
from tests.training.tiny import TinyModel
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training.optimizer.muon import MuonConfig, flat_update, matrix_update

OPTIMIZER = MuonConfig(learning_rate=0.05, weight_decay=0.3, gradient_clip=0.2, adamw_lr_scale=0.5)
SHAPES = [torch.Size(shape) for shape in ((3, 5), (2, 4, 4), (9, 2), (2, 2), (5, 6))]
PADDING = 3


class StackedModel(TinyModel):
    """With two stacked matrices, in which the boundary between two ranks falls within a matrix."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(tied)
        self.mix = torch.nn.Parameter(torch.randn(2, 6, 6) / 6)

    def layer(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return super().layer(torch.tanh(x_BTD @ self.mix[0]) @ self.mix[1])


STACKED = {"optimizer": OPTIMIZER, "model_class": StackedModel}


def flat_difference(world: World) -> float:
    """Largest difference between a rank's part of a flat update and the same part of whole updates."""
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    padding = torch.zeros(PADDING)
    size = (sum(shape.numel() for shape in SHAPES) + PADDING) // world.size
    own = slice(world.rank * size, (world.rank + 1) * size)
    flat = flat_update(torch.cat([*(each.flatten() for each in matrices), padding])[own], SHAPES, 5)
    whole = torch.cat([*(matrix_update(each, 5).flatten() for each in matrices), padding])[own]
    return (flat - whole).abs().max().item()


def main(folder: str) -> None:
    world = join_world()
    report = {f"whole {stage}": whole_run(world, stage, Path(folder) / f"pair{stage}", **STACKED) for stage in range(3)}
    for stage in range(3):
        for source in (f"pair{stage}", f"pair{(stage + 1) % 3}", "single"):
            report[f"{source} at {stage}"] = continued_run(world, stage, Path(folder) / source, **STACKED)
    differences = {f"stage {stage}": compare(world, stage, False, **STACKED) for stage in range(3)}
    differences["fault"] = compare_with_faults(world, 2, "gradient", OPTIMIZER)
    flat = float(world.sum_(torch.tensor(flat_difference(world))))
    if world.is_first:
        (Path(folder) / "report.json").write_text(json.dumps([report, differences, flat]))


if __name__ == "__main__":
    main(sys.argv[1])
