"""The suite for a GPU host, run here at toy sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from xlstm_lm.models.presets import preset_names

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "eval" / "gpu_suite.sh"
STAGES = ("correctness", "kernels", "throughput", "generation", "training")


def test_its_models_are_presets():
    names = re.search(r"^models=\((.+)\)$", SUITE.read_text(), re.MULTILINE)[1].split()
    assert len(names) == 4 and set(names) <= set(preset_names())


def test_its_stages_fit_into_ten_minutes():
    text = SUITE.read_text()
    budgets = dict(re.findall(r"^ *stage (\w+) (\d+) ", text, re.MULTILINE))
    assert tuple(budgets) == STAGES
    total = int(re.search(r"^TOTAL=(\d+)", text, re.MULTILINE)[1])
    assert sum(map(int, budgets.values())) <= total <= 580


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    run = subprocess.run([SUITE, "--dry-run"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert [line.split()[1].rstrip(",") for line in summary.splitlines() if line.startswith("ok ")] == list(STAGES)
    assert len(list((tmp_path / "out").iterdir())) == 8
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert {Path(name).name for name in logs.getnames()} >= {f"{stage}.log" for stage in STAGES}


def test_a_stage_that_fails_stops_no_other_and_shows_in_the_exit_status(tmp_path):
    """With a Python that can do nothing, every stage fails, and each is named."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho cannot; exit 3\n")
    python.chmod(0o755)
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    run = subprocess.run([SUITE, "--dry-run"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for stage in STAGES[:4]:
        assert re.search(rf"^FAILED +{stage}: exit code [13]", summary, re.MULTILINE)
    assert re.search(r"^left out +training: not installed here: cannot", summary, re.MULTILINE)
