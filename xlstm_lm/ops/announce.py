"""Say once, by name, when a slower path is taken."""

from __future__ import annotations

import functools
import logging


@functools.cache
def announce_once(message: str) -> None:
    """Log `message` as a warning of the logger "xlstm_lm", the first time it is given in this process."""
    logging.getLogger("xlstm_lm").warning(message)
