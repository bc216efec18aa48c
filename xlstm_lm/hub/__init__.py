"""Models on disk: load them from whatever layout, import them for training, and export them."""

from xlstm_lm.hub.export import save_export
from xlstm_lm.hub.import_model import import_run
from xlstm_lm.hub.load import TrainedModel, load

__all__ = ["TrainedModel", "import_run", "load", "save_export"]
