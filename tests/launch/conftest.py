"""Fixtures of the tests that launch runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.small_run import undisturbed_losses, write_recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe of the runs, and one run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(folder)
    undisturbed_losses(folder)
    return folder
