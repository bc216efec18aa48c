"""Small real runs; also a program that trains one, or trains one while being killed again and again."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from xlstm_lm.training.loop import train
from xlstm_lm.training.run_config import RunConfig, load_run_config

TIMINGS = {"tokens_per_second", "memory_bytes", "elapsed_seconds", "mfu", "slowest_rank", "slowest_host"}
COUNTED_FOLDERS = ("/xlstm_lm/training/", "/xlstm_lm/data/", "/xlstm_lm/parallel/")


def write_text(folder: Path) -> None:
    """A training and a held-out file of made-up sentences."""
    generator = random.Random(0)
    words = ["gate", "state", "memory", "the", "of", "forgets", "holds", "long", "short", "term"]
    for name, count in (("train", 300), ("held_out", 20)):
        lines = [" ".join(generator.choices(words, k=generator.randint(3, 30))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def configure(folder: Path, **overrides: Any) -> RunConfig:
    """A run of two blocks on the text in `folder`; overrides are dotted names with __ for the dot."""
    values = {
        "model.vocab_size": 257,
        "model.embedding_dim": 16,
        "model.num_blocks": 2,
        "model.num_heads": 2,
        "model.pattern": ["mlstm", "slstm"],
        "model.slstm_backend": "recurrence",
        "data.context_length": 16,
        "data.validation_tokens": 300,
        "data.global_batch_size": 4,
        "data.sources": [{"kind": "text_lines", "paths": [str(folder / "train.txt")]}],
        "data.validation": [{"kind": "text_lines", "paths": [str(folder / "held_out.txt")]}],
        "data.num_workers": 0,
        "data.shuffle_documents": 8,
        "training.steps": 10,
        "training.run_dir": str(folder / "run"),
        "training.log_every": 1,
        "training.checkpoint_every": 3,
        "training.validate_every": 4,
        "training.gate_statistics_every": 5,
        "training.precision": "fp32",
        "optimizer.learning_rate": 0.01,
        "schedule.warmup_steps": 2,
    }
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return load_run_config([], values)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMINGS and not key.startswith("ranks/")}
        for line in lines
    ]


def train_counting_calls(run: RunConfig, kill_at: int = 0) -> int:
    """Train; die without warning at the given call of a function of training or data. Gives how many there were."""
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        if event == "call" and any(part in frame.f_code.co_filename for part in COUNTED_FOLDERS):
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        train(run)
    finally:
        sys.setprofile(None)
    return calls


def in_a_process(run: RunConfig, calls_path: Path, kill_at: int = 0) -> int:
    """`train_counting_calls` in a process forked off this one, which has only imported; gives how it ended."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            calls_path.write_text(str(train_counting_calls(run, kill_at)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def train_then_kill_another(folder: Path, seed: int, kills: int, overrides: dict[str, Any]) -> None:
    """Train in folder/whole; train in folder/killed, dying at random points, then to the end. Prints how each ended."""
    importlib.import_module("torch._dynamo")  # torch.optim wants it: imported once for all that are forked off
    generator = random.Random(seed)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
        write_text(folder / name)
    assert in_a_process(configure(folder / "whole", **overrides), folder / "calls") == 0
    calls = int((folder / "calls").read_text())
    endings = []
    # Early enough that the run is not over before it has died several times.
    for kill_at in [generator.randrange(1, calls // 3) for _ in range(kills)] + [0]:
        endings.append(in_a_process(configure(folder / "killed", **overrides), folder / "calls", kill_at))
    print(json.dumps(endings))


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        train_then_kill_another(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
    else:
        train(configure(Path(sys.argv[2]), **json.loads(sys.argv[3])))
