"""The flag --out of the measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

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
