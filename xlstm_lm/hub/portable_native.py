"""The compiled kernels of an exported folder: xlstm-lm's, where it is installed, else none."""

from __future__ import annotations

import importlib

try:
    why_no_kernels = importlib.import_module("xlstm_lm.ops.native").why_no_kernels
    load_kernels = importlib.import_module("xlstm_lm.ops.native").load_kernels
except ImportError:

    def why_no_kernels() -> str:
        """The reason, which is the same everywhere in an exported folder."""
        return "the compiled CPU kernels come with xlstm-lm, which is not installed"

    def load_kernels() -> None:
        """Cannot be done.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the compiled kernels come with xlstm-lm, which is not installed")
