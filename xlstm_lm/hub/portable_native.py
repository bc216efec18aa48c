"""The compiled kernels of an exported folder: xlstm-lm's, where it is installed, else none."""

from __future__ import annotations

import importlib

try:
    kernels_available = importlib.import_module("xlstm_lm.ops.native").kernels_available
    load_kernels = importlib.import_module("xlstm_lm.ops.native").load_kernels
except ImportError:

    def kernels_available(consequence: str) -> bool:
        """No; `portable_cells` has said so."""
        del consequence
        return False

    def load_kernels() -> None:
        """Cannot be done.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the compiled kernels come with xlstm-lm, which is not installed")
