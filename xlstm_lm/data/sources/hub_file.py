"""A file of a data set on the hub, read by ranges of bytes: a reader may begin anywhere in it."""

from __future__ import annotations

import io
from typing import Any

from xlstm_lm.data.sources.config import SourceConfig
from xlstm_lm.data.sources.node_cache import Block, CachedFile
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
            config: The source, for its `retry_seconds`, its `cache_gib` and its description in messages.
            ahead: Whether more is fetched than a read needs, in growing blocks, as suits reading from front to back.
        """
        super().__init__()
        self._url, self._config, self._ahead = url, config, ahead
        self._direct: str | None = None
        """Address that the hub's answer led to, a storage server's; asking it spares the hub's rate limit."""
        self._size: int | None = None
        self._cached = CachedFile(url, config.cache_gib * 2**30)
        self._position = 0
        self._block = Block(0, b"", 0)
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
            self._size = self._cached.block(0, 1, self._fetch).file_bytes
        return self._size

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes: all that fit unless the file ends, or if more is fetched than needed, at least one."""
        filled = 0
        while filled < len(buffer) and not (filled and self._ahead):
            at = self._position - self._block.begin
            if not 0 <= at < len(self._block.content):
                if self._size is not None and self._position >= self._size:
                    break
                self._load(at, len(buffer) - filled)
                at = self._position - self._block.begin
            part = memoryview(self._block.content)[at : at + len(buffer) - filled]
            if not part:
                break
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            self._position += len(part)
        return filled

    def _load(self, at: int, wanted: int) -> None:
        """Replace the block by one with the current position, which is `at` in the old one."""
        goes_on = self._position > 0 and at == len(self._block.content)
        self._block_bytes = min(self._block_bytes * GROWTH, LARGEST_BLOCK_BYTES) if goes_on else FIRST_BLOCK_BYTES
        length = max(wanted, self._block_bytes) if self._ahead else wanted
        self._block = self._cached.block(self._position, self._position + length, self._fetch)
        self._size = self._block.file_bytes

    def _fetch(self, begin: int, end: int) -> Block:
        """Bytes from `begin` up to `end`, or fewer where the file ends.

        Raises:
            UnreachableError: the file is not there, or the hub has not answered for the source's `retry_seconds`.
        """
        received = bytearray()
        patience = Patience(self._config)
        while self._size is None or begin + len(received) < min(end, self._size):
            before = len(received)
            try:
                self._receive(begin + before, end, received)
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
        return Block(begin, bytes(received), self._size)

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
