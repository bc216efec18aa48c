"""Load a trained model: a run, one of its checkpoints, an export of ours, or a transformers `xlstm` folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from xlstm_lm.data import load_tokenizer
from xlstm_lm.hub.transformers_layout import from_transformers
from xlstm_lm.models import FAMILIES
from xlstm_lm.recipe import read_recipe
from xlstm_lm.training.checkpoint import newest_checkpoint

MODEL_TYPE = "xlstm_lm"


class TrainedModel(nn.Module):
    """A model with the folder that it came from. Called with tokens (B, T) it gives logits (B, T, vocabulary)."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        super().__init__()
        self.model, self.folder = model, folder

    def forward(self, tokens_BT: Tensor, resets_BT: Tensor | None = None) -> Tensor:
        return self.model.logits(self.model(tokens_BT, resets_BT))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the model was trained with.

        Raises:
            ValueError: the folder has none.
        """
        own = self.folder / "tokenizer"
        folder = own if own.is_dir() else self.folder
        if not any(folder.glob("*tokenizer*")):  # transformers would make an empty one up
            raise ValueError(f"{self.folder} holds a model but no tokenizer; put its tokenizer files there.")
        return load_tokenizer(folder)


def load(path: str | Path) -> TrainedModel:
    """The model in a folder, in evaluation mode, with float32 weights as they were saved.

    Raises:
        ValueError: there is no such folder, it holds none of the known layouts, its tensors do not fit, or a file is
            damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; give a run, one of its checkpoints, an export, or a transformers xlstm folder."
        )
    if (folder / "checkpoints").is_dir():
        folder = newest_checkpoint(folder)
    if (folder / "manifest.json").is_file():
        config = _config_from(read_recipe(folder / "config.yaml")[0]["model"], folder)
        weights = read_tensors(folder)
    elif (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = read_tensors(folder)
        if values.get("model_type") == MODEL_TYPE:
            config = _config_from(values["model"], folder)
        elif values.get("model_type") == "xlstm":
            config, weights = from_transformers(values, weights)
        else:
            found = values.get("model_type")
            raise ValueError(f"{folder / 'config.json'} has model_type {found!r}; known are {MODEL_TYPE} and xlstm.")
    else:
        raise ValueError(
            f"{folder} is no model: it has neither checkpoints/ (a run), manifest.json (a checkpoint) nor config.json "
            "(an export or a transformers folder)."
        )
    model = FAMILIES[config.family][1](config)
    _fill(model, weights, folder)
    return TrainedModel(model.eval(), folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, in one file or in the several that an index names.

    Raises:
        ValueError: a file is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= safetensors.torch.load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read as safetensors: {error}") from error
    return tensors


def _config_from(values: dict[str, Any], folder: Path) -> Any:
    family = values.get("family")
    if family not in FAMILIES:
        raise ValueError(f"{folder} holds a model of family {family!r}; known are {', '.join(FAMILIES)}.")
    return FAMILIES[family][0](**values)


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy the weights in; whatever is missing, left over or of another shape is named at once."""
    wanted = model.state_dict()
    if model.head.weight is model.embedding.weight:
        weights = {
            "head.weight": weights.get("embedding.weight"),
            "embedding.weight": weights.get("head.weight"),
        } | weights
    problems = [f"{name} is missing" for name in wanted.keys() - weights.keys()]
    problems += [f"{name} is not part of the model" for name in weights.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    if problems:
        raise ValueError(f"The tensors in {folder} do not fit its configuration: {'; '.join(sorted(problems))}.")
    model.load_state_dict(weights)
