"""The house rule on the length of files: one idea a file, and under 400 lines."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 399
"""Lines that a file may have."""


@pytest.mark.parametrize("folder", ["xlstm_lm", "eval"])
def test_files_are_under_400_lines(folder):
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > LONGEST} == {}
