"""What a process does first in which Triton is to interpret its kernels.

In a module of its own, because the new process imports it by name, and `conftest` may name that of another folder.
"""

from __future__ import annotations

import os

import torch


def switch_on() -> None:
    """Have Triton interpret, on one thread."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
