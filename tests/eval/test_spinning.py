"""The study of OpenMP's ways of waiting."""

from __future__ import annotations

import json
import sys

import pytest

from eval import spinning


def run(monkeypatch, capsys, *arguments: str) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Lines of the table, and the rates that are printed after it."""
    monkeypatch.setattr(sys, "argv", ["eval.spinning", *arguments])
    spinning.main()
    printed = capsys.readouterr().out.splitlines()
    return [line for line in printed if line.startswith("|")], json.loads(printed[-1])


def test_rates_are_shares_of_the_librarys_own_alone(monkeypatch, capsys):
    own, passive, bounded = spinning.WAYS
    rates = {"alone": {own: 50.0, passive: 40.0, bounded: 60.0}, "busy loops": {own: 5.0, passive: 20.0, bounded: 10.0}}
    monkeypatch.setattr(spinning, "measure", lambda seconds, rounds, count: rates)
    lines, found = run(monkeypatch, capsys)
    assert found == rates
    assert lines == [
        "| beside | the library's own | passive | bounded spin |",
        "|---|---|---|---|",
        "| alone | 1.000 | 0.800 | 1.200 |",
        "| busy loops | 0.100 | 0.400 | 0.200 |",
    ]


@pytest.mark.slow
def test_every_way_is_measured_beside_every_neighbor(monkeypatch, capsys):
    _, found = run(monkeypatch, capsys, "--seconds", "0.1", "--rounds", "1", "--neighbors", "1")
    assert set(found) == set(spinning.NEIGHBORS)
    assert all(set(rates) == set(spinning.WAYS) for rates in found.values())
    assert all(rate > 0 for rates in found.values() for rate in rates.values())
