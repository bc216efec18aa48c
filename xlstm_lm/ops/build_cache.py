"""The folder for what the compilers of GPU kernels build: local to the node, and this user's alone.

Triton caches under the home directory unless told otherwise. On a cluster that is often a network file system, where
many ranks that compile the same kernels at once fail or hang (triton-lang/triton issues 2688 and 11512).
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from xlstm_lm.base.announce import announce_once

_DIGEST_BYTES = hashlib.sha256().digest_size


@functools.cache
def node_local_folder() -> Path | None:
    """The folder, created with access for this user only; None where it cannot be had, which is announced.

    The temporary directory is open to all, so a folder of that name that someone else could write to is not used: it
    holds machine code that this process would run.
    """
    folder = Path(tempfile.gettempdir()) / f"xlstm_lm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as problem:
        announce_once(f"compiled GPU kernels are not kept on this node: {problem}")
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        announce_once(
            f"compiled GPU kernels are not kept on this node: {folder} is not a folder of this user alone; remove it, "
            "or set TMPDIR to a directory of your own"
        )
        return None
    return folder


def use_node_local_caches() -> None:
    """Set TRITON_CACHE_DIR to a folder on this node, unless it is set. To be called before anything is compiled.

    The folder is made in any case: a compiler whose cache lies in it would make it with access for others.
    """
    folder = node_local_folder()
    if folder is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def cached_binary(key: tuple[str, ...], build: Callable[[], bytes]) -> bytes:
    """The result of `build`, from this node's folder where an earlier process has left it under the same key.

    Args:
        key: all that the result depends on: source, options, versions.
        build: called where there is no entry, or a damaged one, which its result then replaces.
    """
    folder = node_local_folder()
    if folder is None:
        return build()
    path = folder / "nvrtc" / hashlib.sha256("\0".join(key).encode()).hexdigest()
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    digest, binary = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if binary and hashlib.sha256(binary).digest() == digest:
        return binary
    binary = build()
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(binary).digest() + binary)
        Path(file.name).replace(path)
    except OSError as problem:
        announce_once(f"compiled GPU kernels cannot be kept in {path.parent}: {problem}")
    return binary
