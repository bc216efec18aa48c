"""The models of the speed studies: how one is named on the command line, built, and asked which kernels it takes.

Needs torch alone, unless a model is named by a recipe (PyYAML) or wanted as transformers has it (transformers).
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_lm.models import FAMILIES, build_model
from xlstm_lm.models.accounting import model_config
from xlstm_lm.models.presets import PRESETS, preset
from xlstm_lm.ops.loss import linear_cross_entropy

STOCK = "transformers:"


@dataclass(frozen=True)
class Model:
    """A model under test."""

    name: str
    config: Any
    """The sizes of our model that it is, or is a twin of."""
    is_stock: bool
    """Whether transformers computes it."""

    def build(self, device: str, dtype: torch.dtype, generating: bool = False) -> nn.Module:
        """The module, with fresh weights. All have `hidden(tokens)` and `loss(hidden, targets)`, with one and the same
        loss."""
        torch.manual_seed(0)
        module = _stock_model(self.config, generating) if self.is_stock else Own(build_model(self.config))
        return module.to(device, dtype)


def parse_model(text: str) -> Model:
    """A preset, a recipe's path, or a family with fields: "xlstm:embedding_dim=256,num_blocks=8".

    With "transformers:" in front, transformers' own class of the same sizes. "NAME=MODEL" gives it another name.

    Raises:
        ValueError: there is no such model; says what there is.
    """
    name, equals, what = text.partition("=")
    if not equals or ":" in name:
        name, what = text, text
    is_stock = what.startswith(STOCK)
    what = what.removeprefix(STOCK)
    family, _, fields = what.partition(":")
    if family in FAMILIES:
        config_class = FAMILIES[family][0]
        try:
            return Model(name, config_class(**_fields(fields)), is_stock)
        except TypeError:
            known = ", ".join(config_class.__dataclass_fields__)
            raise ValueError(f"{text!r}: a field is unknown; {family} has {known}.") from None
    if what in PRESETS:
        return Model(name, preset(what), is_stock)
    path = Path(what)
    if not what.endswith((".yaml", ".yml")) or not path.is_file():
        raise ValueError(
            f"There is no model {what!r}: give a preset ({', '.join(PRESETS)}), the path of a recipe, or a family "
            f"({', '.join(FAMILIES)}) with fields, such as xlstm:embedding_dim=256,num_blocks=8."
        )
    try:
        return Model(name, model_config(path), is_stock)
    except ImportError as error:
        raise ValueError(
            f"Reading the recipe of {what!r} needs PyYAML ({error}): install it, or give a preset or a family "
            "with fields, such as xlstm:embedding_dim=1024,num_blocks=24."
        ) from error


def _fields(text: str) -> dict[str, Any]:
    """The values in "a=1,b=x"; what is no Python literal is a string."""
    values: dict[str, Any] = {}
    for field in filter(None, re.split(r",(?=\w+=|\w+$)", text)):
        name, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"{field!r} in {text!r} is no field=value.")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


class Own(nn.Module):
    """One of our models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = model.loss

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D)."""
        return self.model(tokens_BT)


class Stock(nn.Module):
    """A causal language model of transformers, with our loss behind it."""

    def __init__(self, model: nn.Module, soft_cap: float | None) -> None:
        super().__init__()
        self.model, self.soft_cap = model, soft_cap

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D)."""
        return self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy as in our models."""
        weight_VD = self.model.get_output_embeddings().weight
        return linear_cross_entropy(hidden_BTD, weight_VD, targets_BT, soft_cap=self.soft_cap, reduction=reduction)


def _stock_model(config: Any, generating: bool) -> Stock:
    """The class of transformers for one of our configurations, with the same sizes.

    Raises:
        ValueError: it has none.
    """
    transformers = _import_transformers()
    if config.family in ("transformer", "mamba") and not getattr(config, "window", None):
        from xlstm_lm.hub.formats.baseline_formats import BASELINE_FORMAT  # needs more than torch

        stock = BASELINE_FORMAT.make_config(config)
    elif config.family == "xlstm" and set(config.block_kinds()) == {"mlstm"} and not config.mixers:
        stock = transformers.xLSTMConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embedding_dim,
            num_hidden_layers=config.num_blocks,
            tie_word_embeddings=config.tie_embeddings,
            embedding_dim=config.embedding_dim,
            num_blocks=config.num_blocks,
            num_heads=config.num_heads,
            qk_dim_factor=config.qk_dim_factor,
            v_dim_factor=config.v_dim_factor,
            ffn_proj_factor=config.mixer("mlstm").feedforward().hidden / config.embedding_dim,
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            mode="inference" if generating else "train",
        )
    else:
        raise ValueError(
            f"transformers has no model like this {config.family}; it has llama, mamba, mamba2 and mLSTMs."
        )
    return Stock(transformers.AutoModelForCausalLM.from_config(stock), config.logit_soft_cap)


def _import_transformers() -> Any:
    """The package; its xLSTM without the package `xlstm`, which would want kernels under a restrictive licence."""
    import transformers
    import transformers.utils

    available = transformers.utils.is_xlstm_available
    transformers.utils.is_xlstm_available = lambda: False
    try:
        importlib.import_module("transformers.models.xlstm.modeling_xlstm")
    finally:
        transformers.utils.is_xlstm_available = available
    return transformers


def describe_kernels(model: Model, taken: Mapping[str, Iterable[str]]) -> str:
    """The kernels taken, for a table's cell."""
    if model.is_stock:
        return "transformers"
    parts = [f"{operation} {' and '.join(backends)}" for operation, backends in sorted(taken.items())]
    if model.config.family == "lstm":
        parts.append(f"torch.{model.config.cell}")
    return ", ".join(parts)
