"""The optimizers, each in one file, by the name that `optimizer.kind` gives them."""

from __future__ import annotations

from xlstm_lm.training.optimizer.adamw import AdamWConfig
from xlstm_lm.training.optimizer.config import OptimizerConfig, build_optimizer, parameter_groups, state_shapes
from xlstm_lm.training.optimizer.muon import MuonConfig

OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "muon": MuonConfig,
}

__all__ = ["OPTIMIZERS", "AdamWConfig", "OptimizerConfig", "build_optimizer", "parameter_groups", "state_shapes"]
