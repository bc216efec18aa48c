"""Caches of what the compilers of GPU kernels build, in the folder of this node.

Triton caches under the home directory unless told otherwise. On a cluster that is often a network file system, where
many ranks that compile the same kernels at once fail or hang (triton-lang/triton issues 2688 and 11512).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.node_folder import node_local_folder

_DIGEST_BYTES = hashlib.sha256().digest_size


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
