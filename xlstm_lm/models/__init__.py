"""The model families."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from xlstm_lm.models.language_model import LanguageModel
from xlstm_lm.models.lstm import LSTM, LSTMConfig
from xlstm_lm.models.mamba import MambaConfig
from xlstm_lm.models.transformer import TransformerConfig
from xlstm_lm.models.xlstm_config import XLSTMConfig

ModelConfig = XLSTMConfig | TransformerConfig | MambaConfig | LSTMConfig

FAMILIES: dict[str, tuple[type[ModelConfig], type[LanguageModel]]] = {
    "xlstm": (XLSTMConfig, LanguageModel),
    "transformer": (TransformerConfig, LanguageModel),
    "mamba": (MambaConfig, LanguageModel),
    "lstm": (LSTMConfig, LSTM),
}


def pinned_backends(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that name a backend, instead of leaving the choice to the device at hand."""
    return {name: value for name, value in values.items() if name.endswith("_backend") and value != "auto"}


def for_any_device(config: ModelConfig) -> ModelConfig:
    """The configuration without pinned backends: how a model is computed is not what it computes."""
    return dataclasses.replace(config, **dict.fromkeys(pinned_backends(vars(config)), "auto"))


def build_model(config: ModelConfig) -> LanguageModel:
    """Model that `config` describes, initialized as its authors do, from torch's current random state."""
    model = FAMILIES[config.family][1](config)
    model.init_weights()
    return model
