"""Our class passes transformers' own tests of a model, as its source distribution carries them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.hub.fetched import installed, source_of

EXCEPTIONS: dict[str, str] = {}
"""Tests that fail, and why they may."""


@pytest.mark.slow
def test_transformers_own_tests_of_a_model(tmp_path):
    theirs = source_of("transformers", transformers.__version__) / "tests"
    environment = {
        **os.environ,
        "TRANSFORMERS_TESTS": str(theirs),
        "PYTHONPATH": str(installed("parameterized")),
        "HF_HUB_OFFLINE": "1",
    }
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", "--rootdir", tmp_path]
    driver = Path(__file__).with_name("transformers_mixins.py")
    command = [sys.executable, "-m", "pytest", *map(str, options), str(driver)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert re.search(r"\b1\d\d passed", finished.stdout), finished.stdout[-3000:] + finished.stderr[-3000:]
    failed = set(re.findall(r"^(?:SUB)?(?:FAILED|ERROR).*::(test_\w+)", finished.stdout, re.MULTILINE))
    assert failed == EXCEPTIONS.keys(), finished.stdout[-20000:]
