"""Load a trained model from any layout that is known, ready to use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from xlstm_lm.base.run_layout import tokenizer_folder
from xlstm_lm.data import Tokenizer, load_tokenizer
from xlstm_lm.hub.download import local_folder
from xlstm_lm.hub.layouts import StoredModel, read_model
from xlstm_lm.models import FAMILIES


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
            ValueError: the folder has none, or one with more tokens than the model.
        """
        tokenizer = load_tokenizer_of(self.folder)
        check_vocabulary(tokenizer, self.model, tokenizer_folder(self.folder))
        return tokenizer


def load_tokenizer_of(model_folder: Path) -> Tokenizer:
    """The tokenizer of the model in a folder.

    Raises:
        ValueError: the folder has none.
    """
    folder = tokenizer_folder(model_folder)
    if not any(folder.glob("*tokenizer*")):  # transformers would make an empty one up
        raise ValueError(f"{model_folder} holds a model but no tokenizer; put its tokenizer files there.")
    return load_tokenizer(folder)


def check_vocabulary(tokenizer: Any, model: nn.Module, origin: object) -> None:
    """Refuse a tokenizer, from `origin`, whose tokens the model has no embeddings for.

    Raises:
        ValueError: there are such tokens.
    """
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"The tokenizer in {origin} has {tokenizer.vocab_size} tokens, but the model's embedding has {rows} rows: "
            "it is not the tokenizer that the model was trained with."
        )


def load(path: str | Path) -> TrainedModel:
    """The model at a path or under an id on the Hugging Face hub, in evaluation mode, with float32 weights.

    Whatever `xlstm_lm.hub.layouts.LAYOUTS` knows: a run or one of its checkpoints, an export, a transformers `xlstm`
    folder, a state dict of the `xlstm` package. Weights that are stored as the model holds them stay in their files'
    pages until they are written to, so that the model is never held twice.

    Each operation is computed by the backend that suits the device at hand. One that the configuration pins suited the
    machine that trained; that it is not used is announced.

    Raises:
        ValueError: there is no model in a known layout, its tensors do not fit, or a file is damaged; or it cannot be
            downloaded.
    """
    stored = read_model(local_folder(path))
    with _parameters_without_memory():
        model = FAMILIES[stored.config.family][1](stored.config)
    _fill(model, stored)
    return TrainedModel(model.eval(), stored.folder)


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Put the parameters of modules that are made in this context on the meta device; buffers stay as they are."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        del module, name
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _fill(model: nn.Module, stored: StoredModel) -> None:
    """Put the weights in; whatever is missing, left over or of another shape is named at once."""
    weights = dict(stored.weights)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = {}
    for name, parameter in wanted.items():
        tied.setdefault(id(parameter), []).append(name)
    problems = []
    for names in tied.values():
        there = [name for name in names if name in weights]
        problems += [f"{name} is missing" for name in names if not there]
        problems += [
            f"{name} is {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in there
            if weights[name].shape != wanted[name].shape
        ]
        problems += [
            f"{name} differs from {there[0]}, which the configuration says it is"
            for name in there[1:]
            if not torch.equal(weights[name], weights[there[0]])
        ]
    problems += [f"{name} is not part of the model" for name in weights.keys() - wanted.keys()]
    if problems:
        raise ValueError(f"The tensors in {stored.folder} do not fit its configuration: {'; '.join(sorted(problems))}.")
    stored.weights.clear()  # so that no tensor is held in two precisions for longer than its own turn
    for names in tied.values():
        tensor = next(weights.pop(name) for name in names if name in weights)
        parameter = nn.Parameter(tensor.to(wanted[names[0]].dtype).contiguous())
        for name in names:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, parameter)
