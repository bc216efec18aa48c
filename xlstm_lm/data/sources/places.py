"""Files that are named by a URL, such as s3://bucket/part.parquet: listed and opened by fsspec."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from xlstm_lm.data.sources.patience import UnreachableError

REMOTE = "://"


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec and not a file of this machine."""
    return REMOTE in path


def list_urls(pattern: str) -> list[str]:
    """URLs of the files that a URL or pattern stands for, sorted.

    Raises:
        ValueError: no file system for that protocol is installed, or it cannot be reached.
    """
    system, path = _system(pattern)
    try:
        found = system.glob(path) if "*" in path or "?" in path or "[" in path else [path]
        return sorted(system.unstrip_protocol(each) for each in found if system.isfile(each))
    except Exception as error:
        raise ValueError(
            f"{pattern} cannot be listed ({type(error).__name__}: {error}): check its name and access"
        ) from error


def size_of(url: str) -> int:
    """Bytes of a file, on this machine or at a URL."""
    if not is_remote(url):
        return Path(url).stat().st_size
    system, path = _system(url)
    return int(system.size(path))


def digest_of(url: str) -> str:
    """Eight hexadecimal digits that change with the file, by what its file system tells: an ETag, a time, a size."""
    system, path = _system(url)
    return hashlib.sha256(str(system.ukey(path)).encode()).hexdigest()[:8]


def open_url(url: str) -> IO[bytes]:
    """Open a file to read its bytes as they are stored. Reading raises UnreachableError where they do not come."""
    return io.BufferedReader(_RemoteFile(url), buffer_size=2**17)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors are those of the way to it, not damage."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        system, path = _system(url)
        self._file: Any = self._reached(lambda: system.open(path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reached(lambda: self._file.seek(offset, whence)))

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes, as many as fit."""
        content = self._reached(lambda: self._file.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _reached(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            reason = f"{self._url} cannot be fetched ({type(error).__name__}: {error})"
            how = "the same command goes on from the last checkpoint once it can"
            raise UnreachableError(ConnectionError(f"{reason}; {how}")) from error


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error
