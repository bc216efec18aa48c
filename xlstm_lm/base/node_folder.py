"""The folder for caches on a node's own disk, which all processes of a user share."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path

from xlstm_lm.base.announce import announce_once


@functools.cache
def node_local_folder() -> Path | None:
    """TMPDIR/xlstm_lm-UID, created with access for this user only; None where it cannot be used, which is announced.

    The temporary directory is open to all, so a folder of that name that someone else could write to is not used: it
    holds machine code that this process would run.
    """
    folder = Path(tempfile.gettempdir()) / f"xlstm_lm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as problem:
        announce_once(f"nothing is cached on this node: {problem}")
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        announce_once(
            f"nothing is cached on this node: {folder} is not a folder of this user alone; remove it, or set TMPDIR to "
            "a directory of your own"
        )
        return None
    return folder
