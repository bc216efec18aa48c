"""Start of a process in which Triton interprets its kernels.

The new process imports this module by name.
"""

from __future__ import annotations

import os

import torch


def switch_on() -> None:
    """Have Triton interpret, on one thread."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
