"""Lines on a terminal, and the kept output of other libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import sys
import termios

import pytest

from xlstm_lm.base import console

logger = logging.getLogger("xlstm_lm")


def test_nothing_is_shown_before_the_console_is_open(capsys):
    console.stage("opening the data")
    console.progress("half")
    assert capsys.readouterr() == ("", "")


def test_stages_and_messages_are_lines_where_there_is_no_terminal(capsys):
    with console.open_console():
        console.stage("opening the data")
        console.progress("not yet time for another line")
        logger.warning("a slower path")
        console.end_stage()
    assert capsys.readouterr() == ("", "opening the data\na slower path\n")


def test_a_terminal_shows_a_clock_that_goes_away(monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with console.open_console():
            console.stage("opening the data")
            console.progress("opening the data: 3 files")
            console.write("a message")
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal that is closed
        while part := os.read(ours, 10_000):
            shown += part
    shown = shown.decode()
    os.close(ours)
    assert "opening the data  00:00" in shown
    assert "\ra message\r\n" in shown
    last_line = shown.rpartition("\n")[2].split("\r")
    assert last_line[-1] == "" and not last_line[-2].strip()  # wiped


def test_other_processes_write_to_the_log(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    with console.open_console(), console.libraries_quieted():
        console.stage("opening the data")
        logger.warning("a slower path")
        console.keep_library_output(tmp_path / "libraries.log")
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "libraries.log").read_text() == "rank 3: a slower path\n"


def test_what_libraries_write_is_kept_in_a_file_and_ours_is_shown(capsys, tmp_path):
    log = tmp_path / "libraries.log"
    log.write_text("an earlier session\n")
    with console.open_console(), console.libraries_quieted():
        print("begin bf16_optimizer")
        handler = logging.StreamHandler()  # as libraries make at import
        console.keep_library_output(log)
        print("MA 0.5 GB", file=sys.stderr)
        logger.warning("ours")
        console.say("a result")
    handler.emit(logging.makeLogRecord({"msg": "after the end"}))
    assert capsys.readouterr() == ("a result\n", "ours\n")
    assert log.read_text() == "an earlier session\nbegin bf16_optimizer\nMA 0.5 GB\nafter the end\n"


def test_what_has_no_file_yet_is_shown_where_the_program_fails(capsys):
    with pytest.raises(ZeroDivisionError), console.libraries_quieted():
        print("a library's last words")
        raise ZeroDivisionError
    assert capsys.readouterr() == ("", "a library's last words\n")


def test_a_console_that_nobody_reads_stops_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        for _ in range(2):
            console.write("step 1")
            console.say("a result")
