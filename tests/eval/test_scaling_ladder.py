"""A ladder of tiny models end to end: trained, collected and fitted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.scaling_laws.__main__ import main
from eval.scaling_laws.collect import collect, configured_flops
from eval.scaling_laws.design import Span
from eval.scaling_laws.designed import Design
from eval.scaling_laws.fits import FitOptions, fit_table
from eval.scaling_laws.points import Table, read_points, write_points
from eval.scaling_laws.work import Work
from tests.eval.small_ladder import design_small
from xlstm_lm.training.loop import train


@pytest.fixture(scope="module", params=["linear", "1-sqrt"])
def ladder(tmp_path_factory, request) -> Design:
    """A trained ladder of one size with one branch and a second seed, cooldowns of either shape."""
    choices = {"sizes": Span(1e4, 1e4, 1), "tokens": Span(1280, 1280, 1), "seeds": 2, "cooldown_shape": request.param}
    design = design_small(tmp_path_factory.mktemp("trained"), **choices)
    work = Work(design)
    assert [run.name for run in work.needed] == [run.run for run in design.runs if run.kind != "branch"]
    for run in design.runs:
        assert work.can_begin(run)
        train(work.planned[run.run].config)
    assert work.left == []
    return design


def test_a_branch_has_the_loss_of_a_run_straight_through(ladder):
    points, missing = collect([ladder.folder])
    assert missing == [] and len(points) == 3
    check = next(point for point in points if point.status == "check")
    branch = next(point for point in points if point.run == check.run.removesuffix("-check"))
    assert check.loss == branch.loss and branch.trunk != branch.run


def test_points_are_those_of_the_configuration(ladder):
    points, _ = collect([ladder.folder])
    for point in (each for each in points if each.status != "check"):
        run = ladder.named(point.run)
        for name in ("params", "params_non_embedding", "tokens", "flops", "learning_rate", "seed", "trunk", "context"):
            assert getattr(point, name) == getattr(run, name), name
        assert point.flops == configured_flops(point) and 1 < point.loss < 5
        assert point.cooldown_shape == run.cooldown_shape == ladder.config(run).schedule.cooldown_shape
        assert point.schedule == "wsd" and point.cooldown_fraction == 0.2 and point.data == "text.txt"


def test_runs_that_differ_in_the_seed_alone_have_its_spread(ladder, tmp_path):
    points, _ = collect([ladder.folder])
    branch, again = sorted((point for point in points if point.status == "finished"), key=lambda point: point.seed)
    assert (branch.seed, again.seed, _check(points).loss_std) == (0, 1, None)
    assert (
        branch.loss_std == again.loss_std == pytest.approx(abs(branch.loss - again.loss) / 2**0.5) and branch.loss_std
    )
    alone, _ = collect([ladder.run_folder(branch.run)])
    assert alone[0].loss_std is None
    given = [dataclasses.replace(branch, loss_std=0.5), dataclasses.replace(branch, run="b", trunk="b", tokens=7e4)]
    write_points([dataclasses.replace(each, source="") for each in given], tmp_path / "given.csv")
    of_table, _ = collect([tmp_path / "given.csv"])
    assert [point.loss_std for point in of_table] == [0.5, branch.loss_std], "a single seed keeps what the table has"


def test_a_collected_table_is_checked_against_the_configurations(ladder, tmp_path):
    points, _ = collect([ladder.folder])
    write_points(points, tmp_path / "runs.csv")
    table = read_points(tmp_path / "runs.csv", configured_flops)
    assert table.points == [point for point in points if point.status != "check"]
    assert table.checks == [_check(points)] and table.notes == []
    wrong = [dataclasses.replace(point, flops=point.flops * 1.02) for point in table.points]
    write_points(wrong, tmp_path / "wrong.csv")
    with pytest.raises(ValueError, match=f"off by over 1%:\n  {wrong[0].run}: "):
        read_points(tmp_path / "wrong.csv", configured_flops)


def _check(points):
    return next(point for point in points if point.status == "check")


def test_collecting_the_same_runs_twice_is_refused(ladder):
    with pytest.raises(ValueError, match="more than once"):
        collect([ladder.folder, ladder.folder])
    branch = ladder.run_folder(next(run.run for run in ladder.runs if run.kind == "branch"))
    with pytest.raises(ValueError, match="more than once"):
        collect([branch, branch])
    with pytest.raises(ValueError, match="is no design, run folder or table"):
        collect([ladder.folder / "nothing"])


def test_a_single_run_folder_is_collected(ladder):
    name = ladder.runs[-1].run
    ((point,), missing) = collect([ladder.run_folder(name)])
    assert (point.run, point.architecture, missing) == (name, "lstm", [])


def test_runs_that_are_not_over_are_named(tmp_path):
    design = design_small(tmp_path, sizes=Span(1e4, 1e4, 1), tokens=Span(1280, 1280, 1), check=False)
    points, missing = collect([design.folder])
    assert points == [] and missing == [f"{design.runs[1].run} has not begun."]
    assert Work(design).can_begin(design.runs[1]) is False
    with pytest.raises(SystemExit, match="2"):
        main(["collect", str(design.folder), "--out", str(tmp_path / "runs.csv")])


def test_branches_of_a_trunk_that_diverged_are_lost_and_not_left(tmp_path, capsys):
    design = design_small(tmp_path, sizes=Span(1e4, 1e4, 1), tokens=Span(1280, 2560, 2), check=False)
    trunk, *branches = design.runs
    folder = design.run_folder(trunk.run)
    steps = [
        {"split": "train", "step": step, "tokens": 64 * step, "loss": None, "skipped": True} for step in range(1, 20)
    ]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    work = Work(design)
    assert work.state(trunk).status == "diverged"
    assert (work.needed, work.left, work.lost) == ([work.planned[trunk.run]], [], branches)
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(design.folder)])
    printed = capsys.readouterr().out
    assert f"{branches[0].run} cannot begin: {trunk.run} is over (diverged)." in printed


def command(design: Design, *flags: str) -> list[str]:
    return [sys.executable, "-m", "eval.scaling_laws", "run", str(design.folder), *flags]


@pytest.mark.slow
def test_a_ladder_is_killed_resumed_and_fitted(tmp_path):
    """Processes train 3 sizes with 3 branches each; the command is killed while the first trunk runs."""
    design = design_small(tmp_path, tokens=Span(12800, 51200, 3))
    trunk = design.runs[0]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command(design), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = design.run_folder(trunk.run) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stopped = subprocess.run(command(design, "--max-minutes", "0"), cwd=root, capture_output=True, text=True)
    assert stopped.returncode == 3 and "Left to do" in stopped.stdout, stopped.stderr
    finished = subprocess.run(command(design, "--at-once", "2"), cwd=root, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    sessions = json.loads((design.run_folder(trunk.run) / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2, "the trunk was killed once and resumed"
    points, missing = collect([design.folder])
    branch = next(point for point in points if point.run == _check(points).run.removesuffix("-check"))
    assert missing == [] and len(points) == 10 and branch.loss == _check(points).loss
    used = [point for point in points if point.status != "check"]
    (fit,) = fit_table(Table(used), FitOptions(samples=0)).architectures
    assert set(fit.fits) == {"vpnls", "huber"} and fit.trunks == 3
    again = subprocess.run(command(design), cwd=root, capture_output=True, text=True)
    assert again.returncode == 0 and "Nothing is left of the 13 runs." in again.stdout


def test_a_table_beside_a_design_is_collected(ladder, tmp_path):
    points, _ = collect([ladder.folder])
    more = [dataclasses.replace(points[0], run="other", trunk="other", source="", status="finished")]
    write_points(more, tmp_path / "more.csv")
    both, _ = collect([ladder.folder, tmp_path / "more.csv"])
    assert both == [*points, *more] and Table(both).architectures == ["lstm"]
