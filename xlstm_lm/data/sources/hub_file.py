"""A file of a data set on the hub, read by ranges of bytes: a reader may begin anywhere in it."""

from __future__ import annotations

import io
from typing import Any

from xlstm_lm.data.sources.config import SourceConfig
from xlstm_lm.data.sources.patience import Patience, UnreachableError, status_of

FIRST_BLOCK_BYTES = 2**16
LARGEST_BLOCK_BYTES = 2**23
GROWTH = 4
"""Factor by which blocks grow while a file is read from front to back."""
SILENCE_SECONDS = 60.0
"""Seconds without a byte after which an answer counts as lost."""


class HubFile(io.RawIOBase):
    """The bytes of one file at one commit. Lost connections, 429 and 5xx are waited out where the reading stopped."""

    def __init__(self, url: str, config: SourceConfig, *, ahead: bool) -> None:
        """Prepare to read; nothing is fetched yet.

        Args:
            url: Address of the file on the hub, at a commit.
            config: The source, for its `retry_seconds` and its description in messages.
            ahead: Whether more is fetched than a read needs, in growing blocks, as suits reading from front to back.
        """
        super().__init__()
        self._url, self._config, self._ahead = url, config, ahead
        self._direct: str | None = None
        """Address that the hub's answer led to, a storage server's; asking it spares the hub's rate limit."""
        self._size: int | None = None
        self._position = 0
        self._block = b""
        self._block_begin = 0
        self._block_bytes = FIRST_BLOCK_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self.size() if base is None else base)
        return self._position

    def size(self) -> int:
        """Bytes of the file."""
        if self._size is None:
            self._fetch(0, 1)
        assert self._size is not None
        return self._size

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes, at least one unless the file ends, at most as many as fit."""
        wanted = len(buffer)
        at = self._position - self._block_begin
        if not 0 <= at < len(self._block):
            goes_on = self._position > 0 and at == len(self._block)
            self._block_bytes = min(self._block_bytes * GROWTH, LARGEST_BLOCK_BYTES) if goes_on else FIRST_BLOCK_BYTES
            self._block = self._fetch(self._position, max(wanted, self._block_bytes) if self._ahead else wanted)
            self._block_begin, at = self._position, 0
        part = memoryview(self._block)[at : at + wanted]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self, begin: int, length: int) -> bytes:
        """Bytes from `begin` on: `length`, or fewer where the file ends.

        Raises:
            UnreachableError: the file is not there, or the hub has not answered for the source's `retry_seconds`.
        """
        received = bytearray()
        patience = Patience(self._config)
        while self._size is None or (len(received) < length and begin + len(received) < self._size):
            before = len(received)
            try:
                self._receive(begin + before, begin + length, received)
            except Exception as error:
                if len(received) > before:
                    patience = Patience(self._config)
                if self._direct and 400 <= (status_of(error) or 0) < 500:
                    self._direct = None  # such addresses expire; the hub gives another
                    continue
                try:
                    patience.wait(error)
                except (ValueError, ConnectionError) as final:
                    raise UnreachableError(final) from error
        return bytes(received)

    def _receive(self, begin: int, end: int, received: bytearray) -> None:
        """Append bytes from `begin` up to `end` to `received` as they arrive, and note the file's size."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {} if self._direct else build_hf_headers()
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        client = get_session()
        with client.stream("GET", self._direct or self._url, headers=headers, timeout=SILENCE_SECONDS) as response:
            if response.status_code == 416:  # begins behind the end
                self._size = int(response.headers.get("Content-Range", f"/{begin}").rpartition("/")[2])
                return
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            if response.status_code == 206:
                self._size = int(response.headers["Content-Range"].rpartition("/")[2])
                ignored = 0
            else:  # a server that sends whole files only
                self._size = int(response.headers["Content-Length"])
                ignored = begin
            if response.history:
                self._direct = str(response.url)
            wanted = min(end, self._size) - begin
            for chunk in response.iter_raw():
                part = chunk[ignored:]
                ignored -= min(ignored, len(chunk))
                received += part[:wanted]
                wanted -= min(wanted, len(part))
                if not wanted:
                    return
        raise ConnectionError(f"the answer ended {wanted} bytes early")
