"""Checkpoints of two ranks, killed in each phase, read in parts, and on a full disk; a program for torchrun.

Prints what the tests hold: bytes that each rank read at each stage and how each save ended.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from tests.training.equivalence import build_engine
from tests.training.layouts import load, save, snapshot
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.runs import checkpoint_writer
from xlstm_lm.runs.checkpoint import newest_checkpoint
from xlstm_lm.runs.checkpoint_writer import CheckpointWriter


def bytes_read(world: World, stage: int, run_dir: Path) -> dict[str, list[tuple[int, bool]]]:
    """Save at a stage, read at each: the bytes that each rank read, and whether all values are equal."""
    _, engine = build_engine(world, stage)
    folder = save(world, engine, run_dir)
    before = {name: value.clone() for name, value in [*engine.state.weights(), *engine.state.moments()]}
    engine.close()
    found = {}
    for other in range(4):
        _, engine = build_engine(world, other, seed=5)
        checkpoint = load(engine, folder)
        after = dict([*engine.state.weights(), *engine.state.moments()])
        equal = all(torch.equal(after[name], value) for name, value in before.items()) and after.keys() == before.keys()
        found[f"{stage} to {other}"] = world.gather((checkpoint.bytes_read, equal))
        engine.close()
    return found


def on_a_full_disk(world: World, run_dir: Path) -> str:
    """Save once, fill the disk, save again: the message, which each rank must raise."""
    _, engine = build_engine(world, 2)
    good = save(world, engine, run_dir, step=1)
    filling = run_dir / "filling"
    if world.is_first:
        with filling.open("wb") as file:
            file.write(bytes(max(shutil.disk_usage(run_dir).free - 4096, 0)))
    world.from_first(None)
    try:
        save(world, engine, run_dir, step=2)
        message = ""
    except RunError as error:
        message = str(error)
    messages = world.gather(message)
    if world.is_first:
        assert len(set(messages)) == 1 and newest_checkpoint(run_dir) == good, messages
        assert not list(good.parent.glob(".tmp-*"))
        filling.unlink()
    world.from_first(None)
    save(world, engine, run_dir, step=2)
    engine.close()
    return message


def die_in(world: World, run_dir: Path, where: str, dying: int) -> None:
    """Save step 1; die in a phase of saving step 2."""
    _, engine = build_engine(world, 2)
    save(world, engine, run_dir, step=1)

    def deadly(*_: object, **__: object) -> None:
        os._exit(9)

    if world.rank == dying:
        name, _, place = where.partition(" ")
        original = getattr(checkpoint_writer, name)

        def wrapped(path: Path, *arguments: object) -> object:
            if place in ("", path.name):
                deadly()
            return original(path, *arguments)

        setattr(checkpoint_writer, name, wrapped)
    writer = CheckpointWriter(world, lambda: run_dir)
    writer.save(snapshot(engine, step=2))
    writer.wait()


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    world = join_world()
    if sys.argv[1] == "die":
        die_in(world, folder, sys.argv[3], int(sys.argv[4]))
    else:
        report = {}
        for stage in range(4):
            report |= bytes_read(world, stage, folder / f"stage{stage}")
        report["full disk"] = on_a_full_disk(world, Path(sys.argv[3]) / "run")
        if world.is_first:
            print(json.dumps(report))
