"""The model families, and the one place that knows them all."""

from __future__ import annotations

from torch import nn

from xlstm_lm.models.xlstm import XLSTM
from xlstm_lm.models.xlstm_config import XLSTMConfig

FAMILIES: dict[str, tuple[type, type[nn.Module]]] = {"xlstm": (XLSTMConfig, XLSTM)}


def build_model(config: XLSTMConfig) -> nn.Module:
    """The model that `config` describes, initialised as its family's authors do, from torch's current random state."""
    model = FAMILIES[config.family][1](config)
    model.init_weights()
    return model
