"""The model families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xlstm_lm.models.language_model import LanguageModel
from xlstm_lm.models.lstm import LSTM, LSTMConfig
from xlstm_lm.models.mamba import MambaConfig
from xlstm_lm.models.transformer import TransformerConfig
from xlstm_lm.models.xlstm_config import HybridConfig, XLSTMConfig

ModelConfig = XLSTMConfig | HybridConfig | TransformerConfig | MambaConfig | LSTMConfig

FAMILIES: dict[str, tuple[type[ModelConfig], type[LanguageModel]]] = {
    "xlstm": (XLSTMConfig, LanguageModel),
    "transformer": (TransformerConfig, LanguageModel),
    "mamba": (MambaConfig, LanguageModel),
    "lstm": (LSTMConfig, LSTM),
    "hybrid": (HybridConfig, LanguageModel),
}


def pinned_backends(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that name a backend instead of leaving the choice to the device at hand.

    Those of the sections in `mixers` are named with their kind: `mixers.mamba2.scan_backend`.
    """
    pinned = {name: value for name, value in values.items() if name.endswith("_backend") and value != "auto"}
    for section in _sections(values):
        pinned |= {f"mixers.{section.get('kind')}.{name}": value for name, value in pinned_backends(section).items()}
    return pinned


def with_free_backends(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with every backend left to the device at hand."""
    freed = {name: "auto" if name.endswith("_backend") else value for name, value in values.items()}
    if _sections(values):
        freed["mixers"] = [with_free_backends(section) for section in _sections(values)]
    return freed


def _sections(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sections = values.get("mixers")
    return sections if isinstance(sections, list) and all(isinstance(each, Mapping) for each in sections) else []


def build_model(config: ModelConfig) -> LanguageModel:
    """Model that `config` describes, initialized as its authors do, from torch's current random state."""
    model = FAMILIES[config.family][1](config)
    model.init_weights()
    return model
