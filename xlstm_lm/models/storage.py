"""Sizes of the numbers that a forward pass keeps for its backward pass."""

from __future__ import annotations

from typing import NamedTuple

FLOAT32 = 4
"""Bytes of a number that is kept in float32 whatever the type of a run."""


class Storage(NamedTuple):
    """The type of activations and the device that holds them."""

    itemsize: int
    """Bytes of an activation: 2 in bf16, 4 in float32."""
    device: str
    """Type of the device, cpu or cuda: some layers keep more on a CPU."""

    @property
    def copied(self) -> int:
        """Bytes of the float32 copy of a number, which a run in float32 does not make."""
        return 0 if self.itemsize >= FLOAT32 else FLOAT32

    @property
    def at_least_float32(self) -> int:
        """Bytes of a number that is computed in float32 at least."""
        return max(self.itemsize, FLOAT32)

    def norm(self, kind: str, width: int) -> float:
        """Bytes that a norm of `width` units keeps for each token, its output not among them.

        A GPU keeps the input and the reciprocal root. On a CPU torch has no RMS norm of its own: it keeps the input
        and the normalized input, both in float32.
        """
        if self.device == "cpu" and kind == "rms":
            return 2 * FLOAT32 * width + FLOAT32
        return self.itemsize * width + 2 * FLOAT32
