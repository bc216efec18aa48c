"""What the Triton kernels of both cells ask of a GPU before they are launched."""

from __future__ import annotations

import functools

import torch


@functools.cache
def architecture(device: torch.device) -> str:
    """The one of sm_80, sm_90, sm_100 and gfx942 whose launch parameters a device takes."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # Blackwell's cards for a desk (12.0) have the shared memory and tensor cores of their forerunners (8.9).
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; without a GPU those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile has for `width`."""
    return max(16, 1 << (width - 1).bit_length())
