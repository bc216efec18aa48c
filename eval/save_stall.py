"""The time for which an asynchronous save stops training, against the time until the checkpoint is published.

`python -m eval.save_stall --out FILE`, or the same under torchrun for several processes. Saves go through the real
engine and writer to a folder in the current directory that is removed at the end. A step follows each, whose update
waits until the share is copied, and the checkpoint is published before the next save begins.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from eval.bench.measure import environment
from eval.bench.speed_models import parse_model
from eval.command import positive
from eval.study.results_file import results_file, write_results
from xlstm_lm.base.program import program
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.runs.checkpoint_writer import CheckpointWriter, Snapshot
from xlstm_lm.training.build import unbuilt_model
from xlstm_lm.training.engine import TrainingEngine
from xlstm_lm.training.optimizer import AdamWConfig

MODEL = "xlstm:embedding_dim=768,num_blocks=12,num_heads=4,vocab_size=50304"
TOKENS = 64
"""Tokens of the step after a save. The longer a step, the less it waits for the copy."""
KEPT = 2
"""Checkpoints on the disk at a time, besides the one on its way."""


def time_saves(world: World, engine: TrainingEngine, run_dir: Path, saves: int, prepared: bool) -> list[dict[str, Any]]:
    """Seconds of each save on the slowest rank: blocking, in which training stands still, and until published.

    Blocking is the time of the call and of the wait for the copy before the next update. The step after a save may also
    be slower, because the copy uses the processor and the memory: its duration stands beside that of a step before the
    save. Collective.

    Args:
        world: All processes.
        engine: The engine whose state is saved.
        run_dir: Folder that the checkpoints are written to.
        saves: Number of saves.
        prepared: Whether the writer allocates its host buffers before the first save, as the training loop has it do.
    """
    published: list[float] = []
    writer = CheckpointWriter(world, lambda: run_dir, lambda step, seconds: published.append(seconds))
    if prepared:
        writer.prepare(engine.state.shares())
    waits: list[float] = []

    def wait_for_copy() -> None:
        begin = time.perf_counter()
        writer.finish_copy()
        waits.append(time.perf_counter() - begin)

    engine.before_update = wait_for_copy
    blocking, plain_steps, steps = [], [], []
    for step in range(1, saves + 1):
        plain_steps.append(_seconds_of_step(engine))
        waits.clear()
        world.from_first(None)  # ranks begin together
        begin = time.perf_counter()
        writer.save(
            Snapshot(
                state={"step": step, "optimizer_steps": engine.optimizer_steps},
                shapes=engine.state.stored_shapes,
                shares=engine.state.shares(),
                config_yaml="{}\n",
                save_tokenizer=lambda folder: folder.mkdir(exist_ok=True),
                keep=KEPT,
            )
        )
        called = time.perf_counter() - begin
        steps.append(_seconds_of_step(engine))
        blocking.append(called + sum(waits))
        writer.wait()
    ranks = world.gather((blocking, published, plain_steps, steps))
    if not ranks:
        return []
    slowest = ([max(seconds) for seconds in zip(*some, strict=True)] for some in zip(*ranks, strict=True))
    return [
        {
            "blocking_seconds": stop,
            "published_seconds": whole,
            "share": stop / whole,
            "step_before_seconds": before,
            "step_after_seconds": after,
        }
        for stop, whole, before, after in zip(*slowest, strict=True)
    ]


def _seconds_of_step(engine: TrainingEngine) -> float:
    tokens_BT = torch.randint(0, 256, (1, TOKENS), device=engine.world.device)
    begin = time.perf_counter()
    result = engine.train_step(
        [(tokens_BT, tokens_BT, torch.zeros_like(tokens_BT, dtype=torch.bool))], 1 / TOKENS, 1e-4
    )
    assert result.applied
    return time.perf_counter() - begin


@program("eval.save_stall")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.save_stall", description=__doc__)
    add = parser.add_argument
    add("--model", type=parse_model, default=MODEL, help=f"As in eval.throughput. Default: {MODEL}.")
    add("--stage", type=int, choices=range(4), default=1, help="ZeRO stage. Default: 1.")
    add("--saves", type=positive, default=5, metavar="N", help="Saves of each kind of writer. Default: 5.")
    add("--out", type=results_file, metavar="FILE", help="File for the results, as JSON.")
    options = parser.parse_args(arguments)
    world = join_world()
    torch.manual_seed(0)
    config = options.model.config
    engine = TrainingEngine(
        unbuilt_model(config),
        AdamWConfig(),
        {"zero_optimization": {"stage": options.stage}},
        world=world,
        precision="fp32",
        micro_batch_size=1,
        accumulation_steps=1,
    )
    rows = {}
    for name, prepared in (("buffers allocated before", True), ("buffers allocated by the first save", False)):
        with tempfile.TemporaryDirectory(dir=".", prefix="save-stall-") as folder:
            run_dir = Path(world.from_first(folder))
            rows[name] = time_saves(world, engine, run_dir, options.saves, prepared)
    engine.close()
    if not world.is_first:
        return
    print("| writer | save | blocking, ms | until published, s | share | step before, s | step after, s |")
    print(f"|{'---|' * 7}")
    for name, saves in rows.items():
        for which, some in (("first", saves[:1]), ("later ones, median", saves[1:])):
            if some:
                stop, whole, share, before, after = (statistics.median(save[key] for save in some) for key in some[0])
                row = f"{1e3 * stop:.1f} | {whole:.2f} | {100 * share:.1f} % | {before:.2f} | {after:.2f} |"
                print(f"| {name} | {which} | {row}")
    if options.out:
        parameters = count_parameters(config)
        about = {"model": options.model.name, "parameters": parameters, "bytes": 12 * parameters}
        layout = {"processes": world.size, "zero_stage": options.stage}
        write_results(options.out, {"environment": environment(world.device.type), **about, **layout, "saves": rows})


if __name__ == "__main__":
    main()
