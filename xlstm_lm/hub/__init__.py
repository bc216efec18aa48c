"""Models on disk: load them from whatever layout, and export them."""

from xlstm_lm.hub.export import save_export
from xlstm_lm.hub.load import TrainedModel, load

__all__ = ["TrainedModel", "load", "save_export"]
