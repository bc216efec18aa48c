"""Every mixer that a block may have."""

from __future__ import annotations

from xlstm_lm.models.mixers.attention import AttentionConfig
from xlstm_lm.models.mixers.gated_delta import GatedDeltaConfig
from xlstm_lm.models.mixers.mamba1 import Mamba1Config
from xlstm_lm.models.mixers.mamba2 import Mamba2Config
from xlstm_lm.models.mixers.mixer import MixerConfig
from xlstm_lm.models.mixers.mlstm import MLSTMConfig
from xlstm_lm.models.mixers.mlstm_conv import ConvMLSTMConfig
from xlstm_lm.models.mixers.mlstm_paper import PaperMLSTMConfig
from xlstm_lm.models.mixers.slstm import SLSTMConfig

MIXERS: dict[str, type[MixerConfig]] = {
    "mlstm": MLSTMConfig,
    "mlstm_conv": ConvMLSTMConfig,
    "mlstm_paper": PaperMLSTMConfig,
    "slstm": SLSTMConfig,
    "attention": AttentionConfig,
    "mamba1": Mamba1Config,
    "mamba2": Mamba2Config,
    "gated_delta": GatedDeltaConfig,
}
"""Configuration of each mixer by its kind."""
