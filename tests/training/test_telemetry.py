"""metrics.jsonl survives kills and full disks; wandb gets the same numbers; the curve is drawn."""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from pathlib import Path

import pytest
import torch
import wandb.sdk.wandb_run
from matplotlib.figure import Figure

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.metrics import MetricsFile
from xlstm_lm.runs.picture import draw_learning_curve
from xlstm_lm.training.telemetry import Clock, Progress, peak_flops, peak_memory_bytes
from xlstm_lm.training.wandb_run import WandbConfig, WandbRun


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metric(step: int) -> dict:
    numbers = {"tokens": 64 * step, "loss": 2.0, "bits_per_byte": 3.0, "elapsed_seconds": 1.5, "tokens_per_second": 9}
    return {"split": "train", "step": step, **numbers}


def test_the_peak_of_a_process_on_a_cpu_is_that_of_the_kernel():
    status = Path("/proc/self/status").read_text()
    kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(1024 * kibibytes, rel=0.05)


def test_lines_behind_the_checkpoint_and_torn_lines_are_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    superseded = tmp_path / "superseded.jsonl"
    superseded.write_text("of an earlier time\n")
    records = [metric(1), metric(5), metric(3)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + 'null\n{"split": "tr')
    folder = RunFolder(tmp_path)
    metrics, split = MetricsFile(folder), folder.split(3)
    assert len(split.cut) == 3 and split.last_step == 5
    metrics.cut(split)
    before = ["of an earlier time", json.dumps(metric(5)), "null", '{"split": "tr']
    assert superseded.read_text().splitlines() == before
    metrics.append({"split": "train", "step": 4, "loss": math.nan, "lr": 0.5, "gates": math.inf})
    metrics.close()
    assert lines(path) == [
        metric(1),
        metric(3),
        {"split": "train", "step": 4, "loss": None, "lr": 0.5, "gates": None},
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_named(tmp_path):
    metrics = MetricsFile(RunFolder(tmp_path))
    metrics.cut(RunFolder(tmp_path).split(0))
    metrics.close()
    metrics.path = Path("/dev/full")
    metrics.open()
    with pytest.raises(RunError, match=r"/dev/full: the disk is full; [\d.,]+ MiB are free there"):
        metrics.append({"step": 1})
    metrics.close()


def test_pauses_do_not_count_as_training():
    clock = Clock(elapsed_before=100.0)
    clock.restart_window()
    with clock.paused():
        time.sleep(0.2)
    assert clock.restart_window() < 0.1 and clock.elapsed > 100.2


def test_progress_has_the_numbers_and_the_time_left(capsys):
    progress = Progress(steps=1000, done=10, enabled=True)
    progress._start -= 10
    progress.advance()
    progress.show(loss=2.5, bits_per_byte=3.25, tokens_per_second=12345.6)
    assert capsys.readouterr().err.strip() == (
        "step 11/1000  loss 2.5000  bits/byte 3.2500  12,346 tokens/s  ETA 2:44:50"
    )
    Progress(steps=10, done=0, enabled=False).show(loss=1.0, bits_per_byte=1.0, tokens_per_second=1.0)
    assert not capsys.readouterr().err


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None


RECORDS = [
    {"split": "train", "step": 10, "tokens": 100, "loss": 2.0, "bits_per_byte": 3.0},
    {"split": "validation", "step": 10, "tokens": 100, "loss": 1.5, "bits_per_byte": 2.0},
    {"split": "train", "step": 20, "tokens": 200, "loss": 1.8, "bits_per_byte": None},
    {"split": "validation", "step": 20, "tokens": 200, "loss": 1.7, "bits_per_byte": 2.1},
]


def test_the_learning_curve_is_drawn(tmp_path):
    for number, records in enumerate((RECORDS, [])):
        picture = tmp_path / f"{number}.png"
        draw_learning_curve(records, picture, "run")
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_learning_curve_names_what_it_ends_at(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: figures.append(figure))
    for records in (RECORDS, []):
        draw_learning_curve(records, tmp_path / "run.png", "run")
    legends = [figure.axes[0].get_legend() for figure in figures]
    assert [text.get_text() for text in legends[0].get_texts()] == [
        "train: 3.000 at the end",
        "validation: 2.100 at the end",
    ]
    assert legends[1] is None


@pytest.mark.parametrize(("address", "port"), [("https://a.b/c", 443), ("http://a.b/c", 80), ("http://a.b:8080", 8080)])
def test_the_port_of_an_address_is_that_of_its_scheme_unless_it_is_named(address, port, tmp_path, monkeypatch):
    tried = []

    def connect(place, timeout):
        tried.append(place)
        raise OSError

    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setattr(socket, "create_connection", connect)
    WandbRun(WandbConfig(mode="online"), tmp_path, {}).close()
    wandb.teardown()
    assert tried == [("a.b", port)]


@pytest.fixture
def logged(monkeypatch):
    """Records that reach wandb."""
    found = []
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lambda run, data: found.append(data))
    return found


def test_disabled_wandb_does_nothing(tmp_path, logged):
    run = WandbRun(WandbConfig(), tmp_path, {})
    run.log(RECORDS[0])
    run.close()
    assert not logged and not list(tmp_path.iterdir())


def test_offline_wandb_keeps_its_id_and_gets_every_record(tmp_path, logged):
    ids = []
    for _ in range(2):
        run = WandbRun(WandbConfig(mode="offline", name="trial", tags=["a"]), tmp_path, {"model": {"num_blocks": 2}})
        ids.append(run._run.id)
        assert run._run.name == "trial" and run._run.config["model"] == {"num_blocks": 2}
        for record in RECORDS:
            run.log(record)
        assert run._run.summary["validation/best_loss"] == 1.5 and run._run.summary["validation/final_loss"] == 1.7
        run.close()
    assert ids[0] == ids[1] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert logged[0] == {"step": 10, "train/tokens": 100, "train/loss": 2.0, "train/bits_per_byte": 3.0}
    assert logged[1]["validation/loss"] == 1.5 and len(logged) == 8
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_online_wandb_without_a_network_goes_offline_and_says_so(tmp_path, logged, monkeypatch, caplog):
    wandb.teardown()  # it remembers the environment of its first use
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        run = WandbRun(WandbConfig(mode="online"), tmp_path, {})
    assert run._run.offline
    run.close()
    wandb.teardown()
    assert "http://127.0.0.1:9 cannot be reached; logging offline" in caplog.text and "wandb sync" in caplog.text
