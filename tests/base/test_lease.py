"""One process at a time holds a folder: who is refused, what is taken over, and how a lost folder is noticed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from xlstm_lm.base import lease
from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.lease import LEASE_FILE, FolderLease, Holder

ELSEWHERE = "another boot or container"


def in_a_process(action) -> int:
    """Start `action` in a forked process, whose exit code is the action's result; gives its number."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return process


def code_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def leave_behind(folder, **changes) -> None:
    """A lease that nobody gave back."""
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.this_process(), **changes)
    (folder / LEASE_FILE).write_text(json.dumps(asdict(holder)))


def wait_for(path) -> None:
    until = time.monotonic() + 20
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    held = FolderLease.take(tmp_path / "run")

    def other() -> int:
        try:
            FolderLease.take(tmp_path / "run")
        except ValueError as refused:
            (tmp_path / "message").write_text(str(refused))
        return 0

    assert code_of(in_a_process(other)) == 0
    message = (tmp_path / "message").read_text()
    assert "another process is at work there" in message and f"process {os.getpid()} on " in message
    assert "since 20" in message and "choose another folder" in message
    with pytest.raises(ValueError, match="at work"):
        FolderLease.take(tmp_path / "run")  # nor twice in one process
    held.release()
    FolderLease.take(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()  # made for nothing


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_the_lease_of_a_killed_process_is_taken_over_with_a_word(tmp_path, caplog, reaped):
    def hold() -> int:
        FolderLease.take(tmp_path)
        time.sleep(60)
        return 0

    process = in_a_process(hold)
    wait_for(tmp_path / LEASE_FILE)
    with pytest.raises(ValueError, match=f"process {process} on"):
        FolderLease.take(tmp_path)
    os.kill(process, signal.SIGKILL)
    if reaped:
        code_of(process)
    else:
        time.sleep(0.2)
    with caplog.at_level(logging.WARNING, logger="xlstm_lm"):
        FolderLease.take(tmp_path).release()
    assert "over from a process that is gone" in caplog.text and f"process {process} " in caplog.text
    if not reaped:
        code_of(process)


def test_a_process_number_that_is_used_again_is_not_the_holder(tmp_path):
    leave_behind(tmp_path, started="1")
    FolderLease.take(tmp_path).release()


@pytest.mark.parametrize("content", ["", "[1]", '{"host": "a"}', None], ids=["empty", "list", "short", "other host"])
def test_a_holder_that_cannot_be_looked_up_is_gone_when_it_falls_silent(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    leave_behind(tmp_path, process_table=ELSEWHERE)
    if content is not None:
        (tmp_path / LEASE_FILE).write_text(content)
    begin = time.monotonic()
    FolderLease.take(tmp_path).release()
    assert 0.3 < time.monotonic() - begin < 30
    leave_behind(tmp_path, process_table=ELSEWHERE)
    monkeypatch.setattr(lease, "STALE_SECONDS", 100.0)
    long_ago = time.time() - 101
    os.utime(tmp_path / LEASE_FILE, (long_ago, long_ago))
    FolderLease.take(tmp_path).release()  # at once


def test_a_holder_elsewhere_that_gives_signs_of_life_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 60.0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    held = FolderLease.take(tmp_path)  # beats
    monkeypatch.setattr(lease, "_process_table", lambda: ELSEWHERE)
    with pytest.raises(ValueError, match="at work there"):
        FolderLease.take(tmp_path)
    threading.Timer(0.5, held.release).start()
    monkeypatch.setattr(lease, "BEAT_SECONDS", 60.0)
    held._ended.set()
    FolderLease.take(tmp_path).release()  # given back while this one waited


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_many_at_the_same_moment_one_gets_the_folder(tmp_path, stale):
    if stale:
        leave_behind(tmp_path / "run", started="1")
    gate, opened = os.pipe()
    results, write_result = os.pipe()

    def contend() -> int:
        os.close(opened)
        os.read(gate, 1)  # until the gate is opened for all
        try:
            FolderLease.take(tmp_path / "run")
        except ValueError:
            os.write(write_result, b"-")
            return 0
        os.write(write_result, b"+")
        time.sleep(60)
        return 0

    processes = [in_a_process(contend) for _ in range(10)]
    os.close(opened)
    found = b"".join(os.read(results, 1) for _ in processes)  # the one that has it holds it until all are through
    for process in processes:
        os.kill(process, signal.SIGKILL)
        code_of(process)
    assert sorted(found) == sorted(b"+" + 9 * b"-")


def test_a_moved_folder_is_found(tmp_path):
    held = FolderLease.take(tmp_path / "run")
    assert held.place() == tmp_path / "run" and held.is_in_place
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    assert not held.is_in_place
    assert held.place() == tmp_path / "moved"
    held.release()
    assert not list((tmp_path / "moved").iterdir()) and (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(ValueError, match=r"/proc/run can be neither made nor written to .*: choose another folder"):
        FolderLease.take(Path("/proc/run"))


def delete(folder) -> None:
    shutil.rmtree(folder)


def replace_by_a_copy(folder) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def take_over(folder) -> None:
    (folder / LEASE_FILE).unlink()
    leave_behind(folder, pid=1)


def remove_lease(folder) -> None:
    (folder / LEASE_FILE).unlink()


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (delete, "was deleted or moved"),
        (replace_by_a_copy, "replaced by a copy"),
        (take_over, "taken over by process 1 on"),
        (remove_lease, "was replaced, or"),
    ],
)
def test_a_lost_folder_is_noticed(tmp_path, lose, message):
    held = FolderLease.take(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").touch()
    lose(tmp_path / "run")
    assert not held.is_in_place
    with pytest.raises(RunError, match=message):
        held.place()
    left = sorted((tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else None
    held.release()  # of what is another's by now, nothing is removed
    assert left == (sorted((tmp_path / "run").iterdir()) if left is not None else None)


def test_a_process_number_is_one_of_this_boot_and_container(monkeypatch):
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert lease._process_table() == f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert lease._process_table() == socket.gethostname()
