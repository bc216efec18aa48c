"""Strings of formal languages with one answer each, after the last symbol (Delétang et al., arXiv 2207.02098).

As in figure 4 of the xLSTM paper (arXiv 2405.04517), a model trains on short strings and is asked about longer ones.
The answer is predicted at the last symbol, in the place of the next one, and is the only target, unless a study asks at
every symbol for the answer so far: a signal that is many times denser, for the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from eval.tasks.task import Case, Example
from xlstm_lm.base.fields import Size, check_fields
from xlstm_lm.data import IGNORED_TARGET

MODULUS = 5
POSITIONS = tuple(f"P{position}" for position in range(MODULUS))
ARITHMETIC = (*map(str, range(MODULUS)), "+", "-", "*", "(", ")")
PLUS, MINUS, TIMES, OPEN, CLOSE = range(MODULUS, len(ARITHMETIC))  # places in ARITHMETIC, as numbers are their own


String = tuple[np.ndarray, np.ndarray]
"""The symbols of a string, and the answer for each of its beginnings, NONE where that is no string of the language;
both by their place in the language's tuples."""
NONE = -1


@dataclass(frozen=True)
class Language:
    """A language: its symbols, the answers there are (chance is one over their number), and how a string is drawn."""

    symbols: tuple[str, ...]
    answers: tuple[str, ...]
    draw: Callable[[int, np.random.Generator], String]
    """A string of the given length."""
    odd: bool = False
    """Whether every string has an odd length."""


def parity(length: int, generator: np.random.Generator) -> String:
    """Whether the number of 1s is odd."""
    bits = generator.integers(2, size=length)
    return bits, bits.cumsum() % 2


def even_pairs(length: int, generator: np.random.Generator) -> String:
    """Whether ab and ba together occur an even number of times (a) or an odd one (b)."""
    letters = generator.integers(2, size=length)
    return letters, np.diff(letters, prepend=letters[0]).cumsum() % 2


def cycle_navigation(length: int, generator: np.random.Generator) -> String:
    """The end of a walk on a cycle of five positions that starts at P0 and stays or steps to a side."""
    moves = generator.integers(3, size=length)
    return moves, np.array([0, 1, -1])[moves].cumsum() % MODULUS


def modular_arithmetic(length: int, generator: np.random.Generator) -> String:
    """The value modulo five of numbers joined by + - *, products first."""
    numbers = generator.integers(MODULUS, size=length // 2 + 1).tolist()
    operators = generator.integers(PLUS, TIMES + 1, size=length // 2).tolist()
    symbols, answers, total, product = numbers[:1], numbers[:1], 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == TIMES:
            product = product * number % MODULUS
        else:
            total, product = total + product, number if operator == PLUS else -number
        symbols += [operator, number]
        answers += [NONE, (total + product) % MODULUS]
    return np.array(symbols), np.array(answers)


def bracketed_arithmetic(length: int, generator: np.random.Generator) -> String:
    """The value modulo five of an expression in which every operation has brackets of its own."""
    symbols, value = _expression(length, generator)
    return np.array(symbols), np.array([NONE] * (length - 1) + [value])


def _expression(length: int, generator: np.random.Generator) -> tuple[list[int], int]:
    """n, -n, (n), (-n) and from five symbols on (E + E), (E - E), (E * E), cut at a random place."""
    if length < 3:
        number = int(generator.integers(MODULUS))
        return ([number], number) if length == 1 else ([MINUS, number], -number % MODULUS)
    if length < 5:
        symbols, value = _expression(length - 2, generator)
        return [OPEN, *symbols, CLOSE], value
    left = int(generator.integers(1, length - 3))
    operator = int(generator.integers(PLUS, TIMES + 1))
    first, a = _expression(left, generator)
    second, b = _expression(length - 3 - left, generator)
    value = {PLUS: a + b, MINUS: a - b, TIMES: a * b}[operator] % MODULUS
    return [OPEN, *first, operator, *second, CLOSE], value


LANGUAGES: dict[str, Language] = {
    "parity": Language(("0", "1"), ("0", "1"), parity),
    "even_pairs": Language(("a", "b"), ("a", "b"), even_pairs),
    "cycle_navigation": Language(("STAY", "+1", "-1"), POSITIONS, cycle_navigation),
    "modular_arithmetic": Language(ARITHMETIC[:OPEN], ARITHMETIC[:MODULUS], modular_arithmetic, odd=True),
    "modular_arithmetic_brackets": Language(ARITHMETIC, ARITHMETIC[:MODULUS], bracketed_arithmetic),
}


@dataclass(kw_only=True)
class FormalLanguage:
    """Strings of a formal language. A case is (length,)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Literal["parity", "even_pairs", "cycle_navigation", "modular_arithmetic", "modular_arithmetic_brackets"]
    """The language."""
    lengths: tuple[Size, Size] = (3, 40)
    """Shortest and longest string of training; each length between them is equally likely."""
    ask: Literal["last", "every"] = "last"
    """last: the string's answer is the only target of training, as published; every: so are those of its beginnings."""

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        language = LANGUAGES[self.name]
        self.symbols = tuple(dict.fromkeys((*language.symbols, *language.answers, "PAD")))
        self.chance = 1 / len(language.answers)
        self.padding = self.symbols.index("PAD")
        self.case_names, self.trained = ("length",), self.lengths
        # By the answer's place; NONE comes last.
        self._targets = np.array([*map(self.symbols.index, language.answers), IGNORED_TARGET])
        shortest, longest = self.lengths
        self._lengths = [length for length in range(shortest, longest + 1) if length % 2 or not language.odd]
        if not self._lengths:
            odd = " of an odd length" if language.odd else ""
            raise ValueError(f"task.lengths is {list(self.lengths)}; give a shortest and a longest string{odd}.")

    @property
    def longest(self) -> int:
        """Tokens of the longest training sequence."""
        return self._lengths[-1]

    def draw(self, generator: np.random.Generator) -> Example:
        """A string of training."""
        length = self._lengths[generator.integers(len(self._lengths))]
        symbols, answers = LANGUAGES[self.name].draw(length, generator)
        targets = self._targets[answers]
        if self.ask == "last":
            targets[:-1] = IGNORED_TARGET
        return symbols, targets

    def example(self, case: Case, generator: np.random.Generator) -> Example:
        """A string of a length, to test with: only the last answer counts, whatever the targets of training."""
        symbols, answers = LANGUAGES[self.name].draw(case[0], generator)
        targets = np.full(len(symbols), IGNORED_TARGET)
        targets[-1] = self._targets[answers[-1]]
        return symbols, targets

    def check(self, case: Case) -> None:
        """Refuse a case that there is not.

        Raises:
            ValueError: no length, or none that the language has.
        """
        if len(case) != 1 or case[0] < 1 or (LANGUAGES[self.name].odd and case[0] % 2 == 0):
            kind = "an odd length" if LANGUAGES[self.name].odd else "a length"
            raise ValueError(f"test names {list(case)}; for {self.name} give {kind} of at least 1, such as 41.")
