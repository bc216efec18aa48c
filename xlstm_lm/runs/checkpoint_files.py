"""Check of a checkpoint's files against its manifest. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xlstm_lm.base.durable_files import crc32_of
from xlstm_lm.base.run_layout import MANIFEST


def file_damage(folder: Path, files: dict[str, Any], checksums: bool = True) -> str:
    """Describe the damage of files as a manifest records them, naming the first; empty if all are intact.

    Args:
        folder: Folder of the files and of manifest.json.
        files: Size and CRC-32 of each file, as {"size": ..., "crc32": ...}, by its name in the folder.
        checksums: Whether contents are compared too, which reads all files; otherwise only sizes are.
    """
    for name, recorded in files.items():
        path = folder / name
        if not isinstance(recorded, dict) or not {"size", "crc32"} <= recorded.keys():
            return f"{folder / MANIFEST} is damaged: it gives no size and checksum of {name}."
        if not path.is_file():
            return f"{path} is missing from its checkpoint."
        if path.stat().st_size != recorded["size"]:
            return f"{path} is damaged: it has {path.stat().st_size} bytes instead of {recorded['size']}."
        if checksums and crc32_of(path) != recorded["crc32"]:
            return f"{path} is damaged: its checksum differs from the one in manifest.json."
    return ""
