"""Multi-query associative recall (Arora et al., arXiv 2312.04927): pairs of key and value, then keys again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np

from eval.tasks.task import Case, Example
from xlstm_lm.base.fields import Positive, Range, Size, check_fields
from xlstm_lm.data import IGNORED_TARGET


@dataclass(kw_only=True)
class AssociativeRecall:
    """Sequences of pairs and queries. A case is (context, pairs).

    The first half of the vocabulary are keys, the second values. A sequence begins with its pairs; behind them each key
    comes once more, followed by its value, among random tokens. Only these second keys have a target, the value. How
    far behind the pairs they come follows a power law: most come soon.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Literal["associative_recall"] = "associative_recall"
    """The task."""
    vocab_size: Annotated[int, Range(4, 2**20)] = 8192
    """Keys and values together."""
    cases: list[tuple[Size, Size]] = field(default_factory=lambda: [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)])
    """Contexts and pairs of training; each is equally likely."""
    power: Positive = 0.01
    """The chance of a gap g is as g ** (power - 1)."""

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if not self.cases:
            raise ValueError("task.cases is empty; give contexts and pairs, such as [[64, 4]].")
        if self.vocab_size % 2:
            raise ValueError(f"task.vocab_size is {self.vocab_size}; it must be even.")
        for case in self.cases:
            self.check(tuple(case))
        half = self.vocab_size // 2
        keys, values = (f"k{number}" for number in range(half)), (f"v{number}" for number in range(half))
        self.symbols = (*keys, *values)
        self.chance = 1 / half
        pairs = [pairs for _, pairs in self.cases]
        self.case_names, self.trained = ("context", "pairs"), (min(pairs), max(pairs))
        self.padding = 0  # any token does: it has no target

    @property
    def longest(self) -> int:
        """Tokens of the longest training sequence."""
        return max(context for context, _ in self.cases)

    def draw(self, generator: np.random.Generator) -> Example:
        """A training sequence."""
        return self.example(self.cases[generator.integers(len(self.cases))], generator)

    def example(self, case: Case, generator: np.random.Generator) -> Example:
        """A sequence of a case: tokens (context,), and targets (context,) that count at the queries."""
        context, pairs = case
        half = self.vocab_size // 2
        keys, values = generator.permutation(half)[:pairs], half + generator.permutation(half)[:pairs]
        tokens = generator.integers(self.vocab_size, size=context)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        # Every query takes two places, so gaps are counted in twos. The first of exponential times, at rates as the
        # chances, are a draw without replacement, and a tenth of the time of generator.choice.
        gaps = np.arange(1, (context - 2 * pairs) // 2 + 1)
        times = generator.exponential(size=len(gaps)) * gaps ** (1 - self.power)
        queries = 2 * pairs + 2 * np.argsort(times)[:pairs]
        tokens[queries], tokens[queries + 1] = keys, values
        targets = np.full(context, IGNORED_TARGET)
        targets[queries] = values
        return tokens, targets

    def check(self, case: Case) -> None:
        """Refuse a case that there is not.

        Raises:
            ValueError: no context and pairs, or too many pairs for the context or the vocabulary.
        """
        if len(case) != 2 or case[1] < 1 or case[0] < 4 * case[1] or case[1] > self.vocab_size // 2:
            raise ValueError(
                f"{list(case)} is no case of associative_recall: give [context, pairs] with at least 4 tokens of "
                f"context a pair, and at most {self.vocab_size // 2} pairs (half of vocab_size)."
            )
