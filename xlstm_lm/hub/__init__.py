"""Models on disk: load them from whatever layout, import them for training, and export them.

After `import xlstm_lm.hub` transformers' Auto classes load our exports without remote code.
"""

from xlstm_lm.hub.card_metadata import CardOptions
from xlstm_lm.hub.export import export, save_export
from xlstm_lm.hub.import_model import import_run
from xlstm_lm.hub.load import TrainedModel, load
from xlstm_lm.hub.registration import register

__all__ = ["CardOptions", "TrainedModel", "export", "import_run", "load", "save_export"]

register()
