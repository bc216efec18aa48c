"""Save at one ZeRO stage and number of processes, load at another, and go on; also a program for torchrun."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.training.equivalence import batches, build_engine, engine_step
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.runs.checkpoint import newest_checkpoint, read_checkpoint
from xlstm_lm.runs.checkpoint_format1 import Checkpoint
from xlstm_lm.runs.checkpoint_writer import Snapshot, write_checkpoint
from xlstm_lm.training.engine import TrainingEngine

SAVED_STEP = 2


def save(world: World, engine: TrainingEngine, run_dir: Path, step: int = SAVED_STEP, keep: int = 3) -> Path:
    return write_checkpoint(run_dir, world, snapshot(engine, step, keep))


def snapshot(engine: TrainingEngine, step: int = SAVED_STEP, keep: int = 3) -> Snapshot:
    return Snapshot(
        state={"step": step, "optimizer_steps": engine.optimizer_steps, "processes": engine.world.size},
        shapes=engine.state.stored_shapes,
        shares=engine.state.shares(),
        config_yaml="{}\n",
        save_tokenizer=lambda folder: folder.mkdir(exist_ok=True),
        keep=keep,
    )


def load(engine: TrainingEngine, folder: Path) -> Checkpoint:
    checkpoint = read_checkpoint(folder)
    engine.state.load(
        partial(checkpoint.part, "model"), partial(checkpoint.part, "optimizer"), checkpoint.state["optimizer_steps"]
    )
    return checkpoint


def losses(world: World, engine: TrainingEngine, first: int, last: int) -> list[float]:
    """Losses and gradient norms of the steps."""
    found = []
    for step in range(first, last):
        result, loss = engine_step(world, engine, batches()[step], step)
        found += [loss, float(result.gradient_norm)]
    return found


def whole_run(world: World, stage: int, run_dir: Path, precision: str = "fp32", **options: Any) -> list[float]:
    """Steps to the end, saved on the way; gives what came after the save. `options` are those of `build_engine`."""
    _, engine = build_engine(world, stage, precision=precision, **options)
    losses(world, engine, 0, SAVED_STEP)
    save(world, engine, run_dir)
    after = losses(world, engine, SAVED_STEP, len(batches()))
    engine.close()
    return after


def continued_run(world: World, stage: int, run_dir: Path, precision: str = "fp32", **options: Any) -> list[float]:
    """From the newest checkpoint to the end, with other weights to begin with."""
    _, engine = build_engine(world, stage, precision=precision, seed=5, **options)
    load(engine, newest_checkpoint(run_dir))
    assert engine.optimizer_steps == SAVED_STEP
    after = losses(world, engine, SAVED_STEP, len(batches()))
    engine.close()
    return after


def main(folder: str) -> None:
    """Save at every stage; load this, that of another stage, and what one process has left there, at every stage."""
    world = join_world()
    report = {f"pair whole {stage}": whole_run(world, stage, Path(folder) / f"pair{stage}") for stage in range(4)}
    for stage in range(4):
        for source in (f"pair{stage}", f"pair{(stage + 1) % 4}", "single0", "single3"):
            report[f"{source} at {stage}"] = continued_run(world, stage, Path(folder) / source)
    if world.is_first:
        (Path(folder) / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
