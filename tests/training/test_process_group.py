"""Processes find each other, and part in peace."""

from __future__ import annotations

from processes import run_ranks


def test_leaving_right_after_a_collective_does_not_abort():
    for _ in range(3):  # one in three would have gone well without the wait
        run_ranks(2, "leaving.py")
