"""Fixtures of the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import configure, write_text
from xlstm_lm.training.loop import train


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """The folder of a run that was never disturbed, in this process."""
    folder = tmp_path_factory.mktemp("reference")
    write_text(folder)
    train(configure(folder))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the text of the runs."""
    write_text(tmp_path)
    return tmp_path
