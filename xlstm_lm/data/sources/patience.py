"""Waiting for the hub: what may pass is retried with growing pauses, and what cannot pass is reported at once."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

from xlstm_lm.data.sources.config import SourceConfig

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
JITTER = 0.5
"""Largest random part of a pause, relative to the pause: ranks that failed together do not return together."""
NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError)
NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3")
logger = logging.getLogger("xlstm_lm")


class UnreachableError(Exception):
    """A file elsewhere could not be fetched. It is no OSError, which readers treat as damage to the file."""

    def __init__(self, reason: ValueError | ConnectionError) -> None:
        super().__init__(str(reason))
        self.reason = reason
        """The error for the user."""


class Patience:
    """Waits out a hub that does not answer, for as long as the source allows."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._pause = FIRST_PAUSE_SECONDS
        self._began: float | None = None

    def call(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, tried again while it fails for reasons that may pass."""
        while True:
            try:
                return action()
            except Exception as error:
                self.wait(error)

    def wait(self, error: Exception) -> None:
        """Pause before the next try, or raise if `error` will not pass or the time is over.

        The pause is at least as long as the answer's Retry-After or RateLimit header demands.

        Raises:
            ValueError: the data set, split or file is not there, or cannot be read.
            ConnectionError: no answer for `retry_seconds`.
        """
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        if not may_pass(error):
            raise ValueError(
                f"{self._config.description} cannot be read ({reason}); check dataset, config_name, split, revision "
                "and data_files, and that your account may read it"
            ) from error
        now = time.monotonic()
        self._began = self._began or now
        pause = max(self._pause, demanded_pause(error))
        if now - self._began + pause > self._config.retry_seconds:
            raise ConnectionError(
                f"{self._config.description} has not answered for {self._config.retry_seconds:.0f} s ({reason}); "
                "the same command goes on from the last checkpoint once it does. "
                "retry_seconds of the source says how long to wait"
            ) from error
        pause *= 1 + JITTER * random.random()
        logger.warning("%s does not answer (%s); next try in %.0f s", self._config.description, reason, pause)
        time.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


def status_of(error: Exception) -> int | None:
    """The HTTP status of an answer that is an error; None for other errors."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)


def demanded_pause(error: Exception) -> float:
    """Seconds that the server demands to wait, by its headers RateLimit or Retry-After; 0 where it demands none."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    limit = parse_ratelimit_headers(headers) if status_of(error) == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    wanted = str(headers.get("Retry-After", "")).strip()
    return float(wanted) if wanted.isdigit() else 0.0


def may_pass(error: Exception) -> bool:
    """Whether waiting can help: no connection, or an answer such as 429 or 503; not a name that is wrong."""
    status = status_of(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, NOT_THERE):
        return False
    network = type(error).__module__.split(".")[0] in NETWORK_PACKAGES
    return isinstance(error, (ConnectionError, TimeoutError)) or network
