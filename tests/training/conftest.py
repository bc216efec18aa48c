"""Fixtures of the tests of whole runs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.runs import configure, write_text
from xlstm_lm.training import loop
from xlstm_lm.training.loop import train


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """The folder of a run that was never disturbed, in this process."""
    folder = tmp_path_factory.mktemp("reference")
    write_text(folder)
    train(configure(folder))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the text of the runs, whose curves are not drawn: a sixth of their time. `reference` has one."""
    monkeypatch.setattr(loop, "draw_learning_curve", lambda *_: None)
    write_text(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB; the test is skipped where mounting one is not allowed."""
    place = tmp_path / "small_disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # a caught error may still hold a file open
