"""The interface of a task to training and testing."""

from __future__ import annotations

from typing import Protocol

import numpy as np

Case = tuple[int, ...]
"""How hard a sequence is: (length,) of a formal language, (context, pairs) of recall."""
Example = tuple[np.ndarray, np.ndarray]
"""Tokens (T,) and targets (T,) of a sequence; a target is the answer predicted at its place, -100 elsewhere."""


class Task(Protocol):
    """Sequences with answers."""

    name: str
    symbols: tuple[str, ...]
    """The meaning of each token."""
    chance: float
    """The share of right answers of a guess."""
    longest: int
    """Tokens of the longest training sequence."""
    padding: int
    """The token that fills the rest of a row."""
    case_names: tuple[str, ...]
    """Names of the numbers of a case; the last is the horizontal axis of the picture."""
    trained: tuple[int, int]
    """The least and the greatest such number in training."""

    def draw(self, generator: np.random.Generator) -> Example:
        """A training sequence, determined by the generator alone."""

    def example(self, case: Case, generator: np.random.Generator) -> Example:
        """A sequence of a case, to test with."""

    def check(self, case: Case) -> None:
        """Raise ValueError where there is no such case."""


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """Accuracy with chance at 0 and perfection at 1 (arXiv 2405.04517, figure 4)."""
    return (accuracy - chance) / (1 - chance)
