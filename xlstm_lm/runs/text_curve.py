"""A curve drawn with characters, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""From empty to full, in eighths of a line."""
ASCII_BLOCKS = " .:#"
"""The same in thirds, for terminals without the others."""
SMALLEST = 24
"""Columns that the drawing has at least, whatever the width asked for."""


def can_write(encoding: str | None) -> bool:
    """Whether text of an encoding may hold the characters of BLOCKS."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def draw_text_curve(
    points: Sequence[tuple[int, float]], *, width: int, height: int = 8, blocks: str = BLOCKS
) -> list[str]:
    """Draw values over steps as columns; each column is the mean of its steps.

    Args:
        points: Steps, ascending, and finite values.
        width: Characters of a line, including the numbers of the axis.
        height: Lines of the curve.
        blocks: Characters from empty to full.

    Returns:
        The lines: `height` of them and the axis of steps; none without points.
    """
    if not points:
        return []
    low, high = min(value for _, value in points), max(value for _, value in points)
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    margin = max(map(len, labels)) + 2
    columns = _columns(points, max(width, SMALLEST) - margin)
    parts = len(blocks) - 1
    # The lowest value is one part high: a column that is empty has no step.
    levels = [
        0 if value is None else 1 + round((value - low) / ((high - low) or 1.0) * (height * parts - 1))
        for value in columns
    ]
    lines = []
    for line, label in enumerate(labels):
        below = (height - 1 - line) * parts
        drawn = "".join(blocks[min(max(level - below, 0), parts)] for level in levels)
        lines.append(f"{label:>{margin - 2}}  {drawn}".rstrip())
    first, last = str(points[0][0]), str(points[-1][0])
    lines.append(" " * margin + f"{first}{last:>{max(len(columns) - len(first), len(last) + 1)}}")
    return lines


def _columns(points: Sequence[tuple[int, float]], count: int) -> list[float | None]:
    """Mean value of the steps of each column; a column between two steps has the value before it."""
    first, last = points[0][0], points[-1][0]
    count = min(count, last - first + 1)
    collected: list[list[float]] = [[] for _ in range(max(count, 1))]
    for step, value in points:
        collected[(step - first) * (len(collected) - 1) // max(last - first, 1)].append(value)
    columns: list[float | None] = []
    for values in collected:
        mean = math.fsum(values) / len(values) if values else None
        columns.append(mean if mean is not None else columns[-1] if columns else None)
    return columns
