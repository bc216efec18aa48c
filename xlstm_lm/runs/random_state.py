"""States of all random number generators of a process, as bytes."""

from __future__ import annotations

import io
import random

import numpy as np
import torch


def random_state_bytes() -> bytes:
    """Save the states of torch's (CPU and GPU), numpy's and Python's generators with `torch.save`."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "python": (version, list(internal), gauss_next),
    }
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()


def restore_random_state(content: bytes) -> None:
    """Restore all generators from the result of `random_state_bytes`."""
    states = torch.load(io.BytesIO(content), weights_only=True)
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
