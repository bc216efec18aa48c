"""The flag --out of the measurements, and the file of results that it names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.base.outputs import check_output_file
from xlstm_lm.base.paths import user_path


def results_file(text: str) -> Path:
    """A file to write results to, for argparse; refused before any work where something else is there."""
    try:
        out = user_path(text)
        check_output_file(out)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return out


def write_results(out: Path, results: dict[str, Any], default: Callable[[Any], str] | None = None) -> None:
    """Write results as JSON; at any moment the file holds the old ones or the new. `default` is as in json.dumps.

    Raises:
        RunError: the file cannot be written; names the cause and the remedy.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(out, json.dumps(results, indent=1, default=default).encode() + b"\n")
