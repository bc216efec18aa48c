"""The rules of prose that a program can check, for the packages that keep them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT_IN = ("xlstm_lm", "eval", "tests")
"""Folders whose prose is checked."""
OPENERS = re.compile(r"(Of|Its|For|That|As|What|Whether\?)\b")
WORDS = re.compile(r"\b(mend(s|ed|ing)?|anew|hand(s|ed|ing)? in|of ours|so that)\b", re.IGNORECASE)

files = pytest.mark.parametrize(
    "file",
    [file for kept in KEPT_IN for file in sorted((ROOT / kept).rglob("*.py")) if file != Path(__file__)],
    ids=lambda file: file.name,
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone as a statement: docstrings, and those below fields."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text.strip()


@files
def test_docstrings_open_with_a_phrase_that_stands_alone(file):
    assert [f"line {line}: {text[:60]}" for line, text in docstrings(file.read_text()) if OPENERS.match(text)] == []


@files
def test_no_archaic_or_homely_words(file):
    lines = enumerate(file.read_text().splitlines(), 1)
    assert [f"line {number}: {line.strip()}" for number, line in lines if WORDS.search(line)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [('"""Of a run."""\nx = "What"', 1), ('class A:\n    x: int\n    """What it is."""', 1), ('"""Offers."""', 0)],
)
def test_openers_are_found(source, found):
    assert sum(bool(OPENERS.match(text)) for _, text in docstrings(source)) == found
