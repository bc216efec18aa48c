"""The steps that a guard would have skipped, counted from the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.spike_alarms import alarms, main, steps_of


def write_run(folder: Path, losses: dict[int, tuple[float | None, float | None]]) -> Path:
    lines = [
        {"split": "train", "step": step, "tokens": step, "loss": loss, "grad_norm": norm}
        for step, (loss, norm) in losses.items()
    ]
    lines.insert(3, {"split": "event", "step": 3, "event": "skipped", "message": ""})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def healthy(steps: int = 40) -> dict[int, tuple[float | None, float | None]]:
    return {step: (3.0 + 0.01 * (step % 5), 0.5 + 0.01 * (step % 3)) for step in range(1, steps + 1)}


def test_outliers_are_counted_by_quantity_and_in_rows(tmp_path, capsys):
    steps = healthy() | {20: (4.0, 0.5), 21: (4.0, 0.9), 22: (3.01, 0.9), 30: (3.0, 0.55), 31: (None, None)}
    run = write_run(tmp_path, steps)
    found = alarms(steps_of(run), 10.0, 8)
    assert found.outliers == {"loss": [20, 21], "gradient norm": [21, 22], "either": [20, 21, 22]}
    assert (found.judged, found.longest_row) == (31, 3)
    main([str(run), "--window", "8", "--thresholds", "2.5", "10", "1000"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["2.5", "2", "3", "4", "31", "12.90 %", "3"],
        ["10", "2", "2", "3", "31", "9.68 %", "3"],
        ["1000", "0", "0", "0", "31", "0.00 %", "0"],
    ]


def test_a_run_that_is_too_short_has_no_judged_steps(tmp_path, capsys):
    main([str(write_run(tmp_path, healthy(10)))])
    assert "none judged" in capsys.readouterr().out


def test_a_run_that_did_not_log_every_step_is_refused(tmp_path):
    steps = healthy()
    del steps[7]
    with pytest.raises(ValueError, match=r"has 39 logged steps, not every one .*--training\.log_every 1"):
        steps_of(write_run(tmp_path, steps))
