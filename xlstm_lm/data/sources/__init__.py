"""Where documents come from: local files, the Python standard library, or a data set on the Hugging Face hub.

Every source has the same interface: a number of shards (files), and `read`, which gives the records of a list of shards
from any position on.
"""

from pkgutil import resolve_name

from xlstm_lm.data.sources.config import KINDS, SourceConfig
from xlstm_lm.data.sources.local import FileSource
from xlstm_lm.data.sources.record import ORDER, START, Landmark, Piece, Position, Record, Source, refuse

__all__ = [
    "KINDS",
    "ORDER",
    "START",
    "FileSource",
    "Landmark",
    "Piece",
    "Position",
    "Record",
    "Source",
    "SourceConfig",
    "open_source",
    "refuse",
]


def open_source(config: SourceConfig, order: int = ORDER) -> Source:
    """The source that `config` describes, its files listed and looked at; `order` is that of `ORDER`.

    Raises:
        ValueError: files that are missing or empty; a data set that is not there.
        ConnectionError: the hub does not answer.
    """
    return resolve_name(KINDS[config.kind].source)(config, order)
