"""The part of a file of lines that has been read: its length, its checksum, and a landmark for the next restart."""

from __future__ import annotations

import zlib

from xlstm_lm.data.sources.record import Landmark

STEP = 2**20
"""Bytes between places that may become landmarks. A restart reads up to two steps before its position again."""


class Progress:
    """Counts the bytes of a file as they are read, in order."""

    def __init__(self, offset: int = 0, checksum: int | None = 0, state: tuple[int, int] | None = None) -> None:
        """Begin at a place.

        Args:
            offset: Bytes before the place; a multiple of `STEP` if there are to be landmarks.
            checksum: CRC-32 of these bytes; None for a file that cannot change, of which none is kept.
            state: Size and time of change of the file; None for a file without landmarks.
        """
        self.offset, self.checksum = offset, checksum
        self._state = state
        self._next_step = (offset // STEP + 1) * STEP
        self._last = self._landmark()
        self.landmark = self._last
        """The multiple of `STEP` before the last one, or the place of the beginning; None without landmarks."""

    def _landmark(self) -> Landmark | None:
        return None if self._state is None else Landmark(*self._state, self.offset, self.checksum or 0)

    def add(self, content: bytes) -> None:
        """Count bytes that follow those counted so far."""
        if self.checksum is None:
            self.offset += len(content)
            return
        while self.offset + len(content) >= self._next_step:
            cut = self._next_step - self.offset
            self.offset, self.checksum = self._next_step, zlib.crc32(content[:cut], self.checksum)
            self._next_step += STEP
            self.landmark, self._last = self._last, self._landmark()
            content = content[cut:]
        self.offset += len(content)
        self.checksum = zlib.crc32(content, self.checksum)
