"""Warnings that a process logs once, such as that a slower path is used."""

from __future__ import annotations

import functools
import logging

from xlstm_lm.base.tracing import constant_result


@functools.cache
def _announce(message: str) -> None:
    logging.getLogger("xlstm_lm").warning(message)


@constant_result  # torch.compile would follow it into logging
def announce_once(message: str) -> None:
    """Log `message` as a warning of the logger "xlstm_lm", the first time it is given in this process."""
    _announce(message)


announce_once.cache_clear = _announce.cache_clear  # type: ignore[attr-defined] # for tests that expect a message again
