"""Small runs whose numbers may not change, one for each family and kind of block.

`python -m tests.golden.golden_runs` writes the files beside this one from the code as it is. They were written before
the redesign of the operations and models; write them again only where a number is meant to change, and say why.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SHAPE = {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "vocab_size": 257}
MODELS: dict[str, dict[str, Any]] = {
    "mlstm": {"family": "xlstm", "pattern": "mlstm", **SHAPE},
    "mlstm_conv": {"family": "xlstm", "pattern": "mlstm_conv", **SHAPE},
    "mlstm_paper": {"family": "xlstm", "pattern": "mlstm_paper", **SHAPE},
    "slstm": {"family": "xlstm", "pattern": "slstm", **SHAPE},
    "transformer": {"family": "transformer", **SHAPE},
    "mamba1": {"family": "mamba", "version": 1, "embedding_dim": 32, "num_blocks": 2, "vocab_size": 257},
    "mamba2": {
        "family": "mamba",
        "version": 2,
        "head_dim": 16,
        "embedding_dim": 32,
        "num_blocks": 2,
        "vocab_size": 257,
    },
    "gated_delta": {"family": "hybrid", "pattern": "gated_delta", **SHAPE},
    "lstm": {"family": "lstm", "cell": "lstm", "embedding_dim": 32, "num_blocks": 2, "vocab_size": 257},
    "gru": {"family": "lstm", "cell": "gru", "embedding_dim": 32, "num_blocks": 2, "vocab_size": 257},
    "rnn": {"family": "lstm", "cell": "rnn", "embedding_dim": 32, "num_blocks": 2, "vocab_size": 257},
}
MIXED = {**MODELS["mlstm"], "pattern": ["mlstm", "slstm"], "embedding_dim": 16}
"""The model of the checkpoint and of the export."""
STEPS = 20
SAVED_STEP = 4
PROMPT = b"The terms of this License apply to every document."


def settings(model: dict[str, Any], run_dir: Path, text: str = "lines.txt") -> dict[str, Any]:
    """Dotted fields of a run on a text in the current folder.

    The order of the data is that of the first checkpoints only for a text without blank lines, such as `lines.txt`.
    """
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "data.context_length": 48,
        "data.global_batch_size": 4,
        "data.sources": [{"kind": "text_lines", "paths": [text]}],
        "data.num_workers": 0,
        "data.shuffle_documents": 8,
        "training.run_dir": str(run_dir),
        "training.steps": STEPS,
        "training.log_every": 1,
        "training.gate_statistics_every": 0,
        "training.precision": "fp32",
        "optimizer.learning_rate": 0.004,
        "schedule.kind": "constant",
        "schedule.warmup_steps": 4,
    }


def train_in(folder: Path, values: dict[str, Any]) -> list[tuple[int, float, float]]:
    """Train with `folder` as the current one. Returns step, loss (nats a token) and gradient norm of every step."""
    from xlstm_lm.training.loop import train
    from xlstm_lm.training.run_config import load_run_config

    before = Path.cwd()
    os.chdir(folder)
    try:
        run_dir = Path(train(load_run_config([], values)))
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        os.chdir(before)
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def prompt_logits(path: Path) -> torch.Tensor:
    """Logits (vocabulary,) of the token after PROMPT, of the model at `path`."""
    from xlstm_lm.hub import load

    with torch.no_grad():
        return load(path)(torch.tensor([list(PROMPT)]))[0, -1]


def _write() -> None:
    from xlstm_lm import hub

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for text in ("lines.txt", "text.txt"):
            shutil.copy(HERE / text, folder)
        for name, model in MODELS.items():
            _write_numbers(HERE / f"{name}.txt", train_in(folder, settings(model, folder / name)))
        values = settings(MIXED, folder / "run", "text.txt")
        _write_numbers(HERE / "continued.txt", train_in(folder, values | {"training.run_dir": str(folder / "whole")}))
        train_in(folder, values | {"training.steps": SAVED_STEP})
        hub.export(str(folder / "run"), str(folder / "export"), format_name="xlstm_lm")
        logits = prompt_logits(folder / "run")
        (HERE / "logits.txt").write_text("".join(f"{value:.9g}\n" for value in logits.tolist()), encoding="utf-8")
        for name in ("run", "export"):
            with tarfile.open(HERE / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(folder / name, arcname=name)


def _write_numbers(path: Path, numbers: list[tuple[int, float, float]]) -> None:
    lines = [f"{step} {loss:.9g} {norm:.9g}\n" for step, loss, norm in numbers]
    path.write_text("".join(["step loss gradient_norm\n", *lines]), encoding="utf-8")


if __name__ == "__main__":
    _write()
