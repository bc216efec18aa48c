"""Positions at which matches of a regular expression must end or begin, decided from the two characters around them.

A pattern is read as an automaton: its atoms (tests of one character) and which atom may follow which. If no pair of
atoms in succession accepts `left` and then `right`, no match contains both and no attempt at one looks past `left`: the
matches before the position and those after it are the same whether the text is cut there or not.
"""

from __future__ import annotations

import itertools
import platform
import re
import unicodedata
import warnings
from typing import Any, NamedTuple

try:  # private to Python: a version that changes them costs the cuts, never their exactness
    from re import _constants, _parser  # type: ignore[attr-defined]

    ASSERTIONS = (_constants.ASSERT, _constants.ASSERT_NOT)
    REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
except (ImportError, AttributeError):
    _constants = _parser = None

UNKNOWN_PYTHON = f"regular expressions of Python {platform.python_version()} are not understood"
FIRST_PLACEHOLDER = 0xF0000  # private characters that stand for \p{...}, which Python's parser does not have
PROPERTY = re.compile(r"\\(p|P)\{(\^?)(\w+)\}")
CATEGORY = re.compile("[LMNPSZC]|L[ultmo]|M[nce]|N[dlo]|P[cdseifo]|S[mcko]|Z[slp]|C[cf]")


class UnknownBoundariesError(Exception):
    """Cutting a text could change its tokens; the message is the reason."""


def is_stable(character: str) -> bool:
    """Whether every version of Unicode in use gives a character the same properties, and neighbors do not change it."""
    if character.isascii():
        return character.isprintable() or character in "\n\t\r"
    category = unicodedata.category(character)
    jamo = "\u1100" <= character <= "\u11ff"  # Hangul letters, which combine
    return category[0] in "LNPS" and category == unicodedata.ucd_3_2_0.category(character) and not jamo


class _Fragment(NamedTuple):
    """A part of the pattern; atoms are numbers."""

    first: frozenset[int] = frozenset()
    """Atoms a match of it may begin with."""
    last: frozenset[int] = frozenset()
    """Atoms it may end with."""
    alone: frozenset[int] = frozenset()
    """Atoms that make up a match of it by themselves, whatever follows."""
    nullable: bool = True
    """Whether it matches the empty text."""
    plain: bool = True
    """Whether it is free of assertions and possessive parts."""


class Pattern:
    """The matches of one regular expression, as the `tokenizers` library (Oniguruma) finds them one after another."""

    def __init__(self, source: str, *, is_regex: bool = True) -> None:
        """Read the pattern.

        Raises:
            UnknownBoundariesError: it has parts that look at what is before a match, or that are not understood; or
                this version of Python parses patterns differently.
        """
        if _parser is None:
            raise UnknownBoundariesError(UNKNOWN_PYTHON)
        self._atoms: list[tuple[Any, Any, bool]] = []
        self._follow: set[tuple[int, int]] = set()
        self._properties: list[tuple[str, bool]] = []
        try:
            whole = self._sequence(self._parse(source) if is_regex else [(_constants.LITERAL, ord(c)) for c in source])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnknownBoundariesError(f"{UNKNOWN_PYTHON} ({error})") from None
        if whole.nullable:
            raise UnknownBoundariesError(f"the pattern {source!r} matches an empty text")
        self._alone = whole.alone

    def may_join(self, left: str, right: str) -> bool:
        """Whether a match, or an attempt at one, may contain `left` and `right` in succession."""
        return any(
            self._accepts(first, left) is not False and self._accepts(second, right) is not False
            for first, second in self._follow
        )

    def may_contain(self, character: str) -> bool:
        """Whether a match may contain the character."""
        return any(self._accepts(atom, character) is not False for atom in range(len(self._atoms)))

    def always_begins(self, character: str) -> bool:
        """Whether a match begins at every such character that no earlier match contains."""
        return any(self._accepts(atom, character) is True for atom in self._alone)

    def is_exactly(self, character: str) -> bool:
        """Whether the character, and no longer text with it, is a match."""
        return len(self._atoms) == 1 and not self._follow and self.always_begins(character)

    def _parse(self, source: str) -> Any:
        def placeholder(found: re.Match[str]) -> str:
            self._properties.append((found[3], (found[1] == "P") != (found[2] == "^")))
            return chr(FIRST_PLACEHOLDER + len(self._properties) - 1)

        if any(ord(character) >= FIRST_PLACEHOLDER for character in source):
            raise UnknownBoundariesError(f"the pattern {source!r} holds private characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # set operations and nested sets mean something else in Python
                parsed = _parser.parse(PROPERTY.sub(placeholder, source))
        except (re.error, Warning, OverflowError) as error:
            raise UnknownBoundariesError(f"the pattern {source!r} is not understood ({error})") from None
        if parsed.state.flags & ~(re.UNICODE | re.IGNORECASE):
            raise UnknownBoundariesError(f"the pattern {source!r} has flags that are not understood")
        self._ignore_case = bool(parsed.state.flags & re.IGNORECASE)
        return parsed

    _ignore_case = False

    def _sequence(self, items: Any, fold: bool | None = None) -> _Fragment:
        fold = self._ignore_case if fold is None else fold
        whole = _Fragment()
        parts = [self._part(operator, value, fold) for operator, value in items]
        for part in parts:
            self._follow |= set(itertools.product(whole.last, part.first))
            whole = _Fragment(
                whole.first | (part.first if whole.nullable else frozenset()),
                part.last | (whole.last if part.nullable else frozenset()),
                (whole.alone if part.nullable else frozenset()) | (part.alone if whole.nullable else frozenset()),
                whole.nullable and part.nullable,
                whole.plain and part.plain,
            )
        return whole if whole.plain or len(parts) == 1 else whole._replace(alone=frozenset())

    def _part(self, operator: Any, value: Any, fold: bool) -> _Fragment:
        if operator in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY):
            self._atoms.append((operator, value, fold))
            atom = frozenset([len(self._atoms) - 1])
            return _Fragment(atom, atom, atom, nullable=False)
        if operator is _constants.BRANCH:
            branches = [self._sequence(branch, fold) for branch in value[1]]
            return _Fragment(
                frozenset().union(*(branch.first for branch in branches)),
                frozenset().union(*(branch.last for branch in branches)),
                frozenset().union(*(branch.alone for branch in branches)),
                any(branch.nullable for branch in branches),
                all(branch.plain for branch in branches),
            )
        if operator is _constants.SUBPATTERN:
            _, added, removed, items = value
            if (added | removed) & ~re.IGNORECASE:
                raise UnknownBoundariesError("the pattern has flags that are not understood")
            return self._sequence(items, (fold or bool(added)) and not removed)
        if operator is _constants.ATOMIC_GROUP:
            return self._sequence(value, fold)._replace(plain=False)
        if operator in REPEATS:
            least, most, items = value
            body = self._sequence(items, fold)
            if most != 1 or operator is _constants.POSSESSIVE_REPEAT:
                self._follow |= set(itertools.product(body.last, body.first))
            return body._replace(
                alone=body.alone if least <= 1 and most >= 1 else frozenset(),
                nullable=body.nullable or least == 0,
                plain=body.plain and operator is not _constants.POSSESSIVE_REPEAT,
            )
        if operator in ASSERTIONS and value[0] == 1:
            # Its atoms may be looked at after those before it, and nothing follows them.
            return _Fragment(self._sequence(value[1], fold).first, nullable=True, plain=False)
        if operator is _constants.AT and value is _constants.AT_END:
            self._atoms.append((_constants.ANY, None, False))
            return _Fragment(frozenset([len(self._atoms) - 1]), nullable=True, plain=False)
        raise UnknownBoundariesError("the pattern looks at what precedes a match")

    def _accepts(self, atom: int, character: str) -> bool | None:
        """Whether an atom accepts a stable character; None where that is uncertain."""
        operator, value, fold = self._atoms[atom]
        if operator is _constants.ANY:
            return None
        if operator is not _constants.IN:
            accepted = self._is(value, character, fold)
            return accepted if operator is _constants.LITERAL or accepted is None else not accepted
        negated = value[0][0] is _constants.NEGATE
        results = [self._item(*item, character, fold) for item in value[negated:]]  # type: ignore[call-arg]
        accepted = True if True in results else None if None in results else False
        return accepted if not negated or accepted is None else not accepted

    def _item(self, operator: Any, value: Any, character: str, fold: bool) -> bool | None:
        if operator is _constants.LITERAL:
            return self._is(value, character, fold)
        if operator is _constants.RANGE:
            if value[0] <= ord(character) <= value[1]:
                return True
            cases = {character.lower(), character.upper(), character.casefold()}
            return None if fold and len(cases | {character}) > 1 else False
        category = unicodedata.category(character)
        match value:
            case _constants.CATEGORY_SPACE | _constants.CATEGORY_NOT_SPACE:
                accepted: bool | None = character.isspace()
            case _constants.CATEGORY_DIGIT | _constants.CATEGORY_NOT_DIGIT:
                accepted = category == "Nd"
            case _constants.CATEGORY_WORD | _constants.CATEGORY_NOT_WORD:
                uncertain = not character.isascii() and category in ("No", "Nl", "So")
                accepted = None if uncertain else category[0] in "LM" or category in ("Nd", "Pc")
            case _:
                return None
        negated = value in (
            _constants.CATEGORY_NOT_SPACE,
            _constants.CATEGORY_NOT_DIGIT,
            _constants.CATEGORY_NOT_WORD,
        )
        return accepted if not negated or accepted is None else not accepted

    def _is(self, code: int, character: str, fold: bool) -> bool | None:
        if code >= FIRST_PLACEHOLDER:
            name, negated = self._properties[code - FIRST_PLACEHOLDER]
            category = unicodedata.category(character)
            if not CATEGORY.fullmatch(name) or (fold and category[0] == "L"):
                return None
            return category.startswith(name) != negated
        if chr(code) == character:
            return True
        folded, other = character.casefold(), chr(code).casefold()
        return None if fold and (folded in other or other in folded) else False
