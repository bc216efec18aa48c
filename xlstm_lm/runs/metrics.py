"""Writer of metrics.jsonl: one JSON object a line, each with split and step."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from xlstm_lm.base.durable_files import disk_errors_explained, replace_durably
from xlstm_lm.runs.folder import MetricsSplit, RunFolder


class MetricsFile:
    """Writer of metrics.jsonl. Readers use `RunFolder.metrics`."""

    def __init__(self, folder: RunFolder) -> None:
        self.path, self.superseded = folder.metrics_path, folder.superseded_path
        self._file: Any = None

    def cut(self, split: MetricsSplit) -> None:
        """Keep one part of a split, append the other to superseded.jsonl, and open the file for more.

        A run that continues from the split trains the later steps again, and their metrics may differ.
        """
        with disk_errors_explained(self.path):
            if split.cut:
                before = self.superseded.read_bytes() if self.superseded.is_file() else b""
                replace_durably(self.superseded, before + b"".join(line + b"\n" for line in split.cut))
            replace_durably(self.path, b"".join(line + b"\n" for line in split.kept))
            self.open()

    def open(self) -> None:
        """Open the file to append, unbuffered: a failed write is reported at once and not when the file is closed."""
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line. Non-finite numbers are written as null, because JSON cannot represent them."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with disk_errors_explained(self.path):
            self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Flush all lines to the disk, before a checkpoint that relies on them."""
        with disk_errors_explained(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._file:
            self._file.close()
