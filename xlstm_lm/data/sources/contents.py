"""The bytes of local files: decompressed, told apart by content rather than by name, and hashed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow

from xlstm_lm.data.sources.places import digest_of, is_remote, open_url

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""Errors raised while a damaged or missing file is read."""

HEAD_BYTES = 1024
BUFFER_BYTES = 2**17
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NO_TEXT = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PK\x05\x06": "an empty zip archive: remove it",
    b"7z\xbc\xaf\x27\x1c": "a 7-zip archive: unpack it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it",
    b"\x04\x22\x4d\x18": "compressed by lz4: compress it by zstd or gzip instead",
    b"\x1f\x9d": "compressed by compress: compress it by zstd or gzip instead",
    b"PAR1": "a parquet file: set kind: parquet",
    b"ARROW1": "an Arrow file: convert it to parquet",
    b"%PDF-": "a PDF: extract its text",
    b"\xff\xfe\x00\x00": "UTF-32, not UTF-8: convert it, for example by iconv -f UTF-32 -t UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32, not UTF-8: convert it, for example by iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it, for example by iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it, for example by iconv -f UTF-16 -t UTF-8",
}
"""First bytes of files that are no text, and what they are and want."""

HASHED_BYTES = 512 * 2**20
"""Approximate limit of the bytes hashed for one source: all of its files, or samples of equal size from each."""
SAMPLE_BYTES = 64 * 2**10


Opener = Callable[[], IO[bytes]]
"""Opens a file that is not on this machine, to read its bytes as they are stored; it can peek."""


def _open_zstandard(file: IO[bytes]) -> Any:
    return pyarrow.input_stream(file, compression="zstd")


COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    rb"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.BZ2File,
    rb"\xfd7zXZ\x00": lzma.LZMAFile,
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": _open_zstandard,  # the second: a frame that readers skip
}
"""First bytes of compressed files, and their readers."""


class _Decompressed(io.BufferedReader):
    """A reader of decompressed bytes that closes the compressed file with itself."""

    def __init__(self, decompressor: Any, compressed: IO[bytes]) -> None:
        super().__init__(decompressor, buffer_size=BUFFER_BYTES)
        self._compressed = compressed

    def close(self) -> None:
        super().close()
        self._compressed.close()


def open_file(file: str | Path | Opener) -> IO[bytes]:
    """Open a file, on this machine or by its opener, to read its bytes, decompressed if its content is compressed."""
    if callable(file):
        plain: Any = file()
    else:
        plain = open_url(str(file)) if is_remote(str(file)) else Path(file).open("rb")  # noqa: SIM115
    try:
        magic = plain.peek(10)[:10]
        decompressor = next((opener for pattern, opener in COMPRESSIONS.items() if re.match(pattern, magic)), None)
        return plain if decompressor is None else _Decompressed(decompressor(plain), plain)
    except BaseException:
        plain.close()
        raise


def open_parquet(file: str | Opener) -> Any:
    """Open a file for pyarrow's reader of parquet, which fetches the parts that it needs."""
    if callable(file):
        return file()
    return pyarrow.PythonFile(open_url(file), mode="r") if is_remote(file) else pyarrow.OSFile(file)


def open_text(path: str | Path | Opener) -> IO[bytes]:
    """`open_file` for files that must hold UTF-8 text.

    Raises:
        OSError: the content is something else, named with the remedy.
    """
    file = open_file(path)
    try:
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]  # type: ignore[attr-defined]
        found = next((found for magic, found in NO_TEXT.items() if head.startswith(magic)), None)
        if head[257:262] == b"ustar":
            found = "a tar archive: set kind: tar, or unpack it"
        if len(head) > 3 and not any(head):
            found = "zeros: it was not written to its end"
        elif len(head) > 3 and not (any(head[::2]) and any(head[1::2])):
            found = NO_TEXT[b"\xff\xfe"]  # Latin letters without a byte order mark: every other byte is 0
        if found is not None:
            raise OSError(f"it is {found}")
    except BaseException:
        file.close()
        raise
    return file


def state_of(file: IO[bytes]) -> tuple[int, int] | None:
    """Bytes and time of the last change (nanoseconds since 1970) of a file that `open_file` has opened.

    None where bytes cannot be read from the middle of it, as it is compressed.
    """
    if isinstance(file, _Decompressed):
        return None
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


class Contents(NamedTuple):
    """Sizes and content hashes of a source's files."""

    digests: list[str]
    """Hash of each file's size and content, 8 hexadecimal digits."""
    newest: int | None
    """Latest change (nanoseconds since 1970) of a file that was too large to be hashed whole; None if none was."""


def hash_files(paths: Sequence[str]) -> Contents:
    """Hash what files hold, wherever they lie and whatever they are called.

    Where the files together hold more than `HASHED_BYTES`, those above their share of it are sampled: evenly spread
    blocks, the first and the last among them. The share depends on the number of files alone, so the hash of a file
    does not change when another file does. A file that cannot be read has a digest of its own; reading it says why.
    """
    share = max(HASHED_BYTES // max(len(paths), 1), 2 * 4096)
    digests, newest = [], None
    for path in paths:
        if is_remote(path):
            digests.append(digest_of(path))
            continue
        try:
            with Path(path).open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                hashed = hashlib.sha256(str(size).encode())
                if size <= share:
                    while block := file.read(2**20):
                        hashed.update(block)
                else:
                    newest = max(newest or 0, os.fstat(file.fileno()).st_mtime_ns)
                    length = min(SAMPLE_BYTES, share // 2)
                    count = share // length
                    for index in range(count):
                        file.seek((size - length) * index // (count - 1))
                        hashed.update(file.read(length))
            digests.append(hashed.hexdigest()[:8])
        except OSError:
            digests.append("unreadbl")
    return Contents(digests, newest)
