"""Export a trained model to a folder of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors.torch

from xlstm_lm.hub.layouts import MODEL_TYPE
from xlstm_lm.hub.load import TrainedModel


def save_export(trained: TrainedModel, out: str | Path) -> Path:
    """Write model and tokenizer to a new folder that `load` reads: `config.json`, `model.safetensors`, `tokenizer/`.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder.")
    tokenizer = trained.tokenizer
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, "model": dataclasses.asdict(trained.model.config)}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_model(trained.model, partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(partial / "tokenizer")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out
