"""`xlstm-lm status` on every kind of folder: fresh, at work, dead, finished, moved, damaged; quickly, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlstm_lm import cli
from xlstm_lm.base.lease import LEASE_FILE, STALE_SECONDS, FolderLease
from xlstm_lm.runs.heartbeats import Heartbeat, write_heartbeats
from xlstm_lm.runs.overview import look_at, one_line, page
from xlstm_lm.runs.status import RunStatus, should_requeue, write_status
from xlstm_lm.runs.text_curve import ASCII_BLOCKS, BLOCKS, can_write, draw_text_curve

SECTIONS = ("data", "optimizer", "schedule", "safeguards", "wandb", "deepspeed")


def make_run(folder: Path, steps: int = 100, logged: int = 50) -> Path:
    """A run's folder as training leaves it, with a checkpoint of its last logged step."""
    folder.mkdir()
    recipe = {name: {} for name in SECTIONS} | {"model": {"family": "xlstm"}, "training": {"steps": steps}}
    recipe["training"]["run_dir"] = str(folder)
    (folder / "config.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in recipe.items()))
    numbers = {"tokens": 7, "bits_per_byte": 1.5, "tokens_per_second": 1234.0, "mfu": 0.4, "slowest_host": "node7"}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, logged + 1, 10):
            record = {"split": "train", "step": step, "loss": 60.0 / step, "elapsed_seconds": 2.0 * step, **numbers}
            file.write(json.dumps(record) + "\n")
    if logged:
        checkpoint = folder / "checkpoints" / f"step_{logged:08}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"12345")
        manifest = {"format": 1, "step": logged, "files": {"model.safetensors": {"size": 5, "crc32": 1}}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def status_of(state: str, step: int = 50, **fields) -> RunStatus:
    values = {"reason": "The reason.", "steps": 100, "attempt": 2, "updated": "2026-11-29T05:00:00+00:00"} | fields
    return RunStatus(state=state, step=step, **values)


def test_a_page_shows_where_a_running_run_stands(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"split": "validation", "step": 50, "tokens": 7, "loss": 1.25}) + "\n")
        for step in range(51, 58):
            file.write(json.dumps({"split": "event", "step": step, "event": "x", "message": f"E{step}."}) + "\n")
    write_status(run, status_of("running"))
    with FolderLease.take(run):
        assert "ranks       none has beaten yet" in page(look_at(run))
        beat = Heartbeat(rank=0, host="node7", pid=5, step=57, phase="step", time=time.time())
        write_heartbeats(run, "node7_0", [beat])
        text = page(look_at(run), width=60)
        line = one_line(look_at(run))
    for part in (
        "running: The reason.",
        "attempt     2",
        "50 of 100 (50%)",
        "loss        1.2000, 1.5000 bits/byte at step 50",
        "validation  1.2500 at step 50",
        "1,234 tokens/s, MFU 40.0%, slowest rank on node7",
        "time left   1 min 40 s",
        f"process {os.getpid()}",
        "beat        rank 0 on node7, process 5: step after step 57, beat 0 s ago",
        "step 50, 0 s ago, all files there",
        "E57.",
    ):
        assert part in text, part
    assert "E52." not in text and "problem" not in text
    assert max(map(len, text.splitlines()[-10:])) <= 60
    assert line == f"{run}: running, step 50 of 100, loss 1.2000, 1 min 40 s left"


def test_a_run_that_is_running_and_does_not_beat_is_dead(tmp_path):
    run = make_run(tmp_path / "run")
    write_status(run, status_of("running"))
    assert look_at(run).state == "dead"  # without a lease
    foreign = {"host": "elsewhere", "process_table": "other", "pid": 1, "started": "1", "since": "-", "command": "-"}
    (run / LEASE_FILE).write_text(json.dumps(foreign))
    assert look_at(run).state == "running"
    silent = time.time() - STALE_SECONDS - 60
    os.utime(run / LEASE_FILE, (silent, silent))
    assert look_at(run).state == "dead" and "process 1 on elsewhere, dead, beat" in page(look_at(run))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with FolderLease.take(tmp_path / "other"):
        holder = json.loads((tmp_path / "other" / LEASE_FILE).read_text())
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    (run / LEASE_FILE).write_text(json.dumps(holder | {"pid": child.pid, "started": stat[19]}))
    assert look_at(run).state == "running"
    child.kill()
    child.wait()
    assert look_at(run).state == "dead", "killed on this machine: known at once"


def test_folders_that_are_fresh_finished_moved_or_of_no_run_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not there"):
        look_at(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no run: it has neither config.yaml"):
        look_at(tmp_path)
    fresh = page(look_at(make_run(tmp_path / "fresh", logged=0)))
    assert "no step logged yet" in fresh and "none yet" in fresh and "made no step" in fresh
    begun = look_at(make_run(tmp_path / "begun", logged=10))
    assert one_line(begun).endswith("step 10 of 100, loss 6.0000") and "6.0000, 1.5000 bits/byte" in page(begun)
    finished = make_run(tmp_path / "finished", logged=100)
    assert look_at(finished).state == "finished"
    write_status(finished, status_of("finished", step=100))
    assert "100 of 100 (100%)" in page(look_at(finished)) and "time left" not in page(look_at(finished))
    finished.rename(tmp_path / "moved")
    assert "moved or copied: the run was made in " in page(look_at(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "model: [", "config.yaml"),
        ("status.json", "{", "status.json is damaged"),
        ("status.json", '{"state": "lost"}', "status.json is damaged"),
        ("metrics.jsonl", '{"split": "train"}\nx\n', "metrics.jsonl, line 1, is damaged"),
        ("checkpoints/step_00000050/model.safetensors", "1234", "it has 4 bytes instead of 5"),
        ("checkpoints/step_00000050/manifest.json", "", "manifest.json is damaged"),
        (LEASE_FILE, "", "unknown process"),
        ("heartbeats/node7_0.json", "{", "node7_0.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path, name, content, message):
    run = make_run(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    text = page(look_at(run))
    assert message in text and "checkpoint  step 50" in text


def test_the_command_prints_pages_and_answers_for_a_requeue(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    cli.main(["status", *runs])
    assert len(capsys.readouterr().out.splitlines()) == 2
    for state, code in (("running", 0), ("finished", 1)):
        write_status(tmp_path / "a", status_of(state))
        with pytest.raises(SystemExit) as ended:
            cli.main(["status", runs[0], "--requeue"])
        assert ended.value.code == code
    assert "no requeue: the run has made its 100 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(tmp_path), "--requeue"])
    assert ended.value.code == 2


def test_a_run_whose_last_attempts_made_no_step_is_not_started_again():
    idle = {"from_step": 50, "to_step": 50}
    moved = {"from_step": 40, "to_step": 50}
    for attempts, again in (([idle] * 2, True), ([moved, idle, idle], True), ([moved, idle, idle, idle], False)):
        assert should_requeue(status_of("failed", attempts=attempts, requeue=True))[0] == again
    assert not should_requeue(status_of("failed", requeue=False))[0] and not should_requeue(None)[0]


def test_the_command_does_not_import_torch(tmp_path):
    make_run(tmp_path / "run")
    program = "import sys; from xlstm_lm import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, "status", str(tmp_path / "run")], check=True, timeout=60)


def test_a_curve_falls_from_the_full_height_to_the_lowest_part():
    points = [(step, 100.0 - step) for step in range(1, 101)]
    for blocks in (BLOCKS, ASCII_BLOCKS):
        *lines, axis = draw_text_curve(points, width=40, height=5, blocks=blocks)
        assert len(lines) == 5 and max(map(len, lines)) <= 40 and axis.split() == ["1", "100"]
        columns = [line[8:].ljust(32) for line in lines]
        heights = [sum(blocks.index(line[column]) for line in columns) for column in range(32)]
        assert heights == sorted(heights, reverse=True)
        assert heights[0] >= 5 * (len(blocks) - 1) - 1 and heights[-1] == 1
    assert draw_text_curve([], width=40) == [] and len(draw_text_curve([(5, 1.0)], width=40)) == 9
    assert can_write("utf-8") and not can_write("ascii") and not can_write(None)
