"""The description of this machine that runs and results record."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest
import torch

from xlstm_lm.base import machine

ROOT = Path(__file__).parents[2]


def test_an_environment_names_versions_and_hardware():
    here = machine.environment(torch.device("cpu"))
    assert json.loads(json.dumps(here)) == here
    assert here["python"] == platform.python_version() and here["device"] == machine.cpu_name()
    assert here["versions"]["torch"] == torch.__version__ and here["versions"].keys() == set(machine.PACKAGES)
    assert here["cpu_count"] >= 1 and here["torch_threads"] == torch.get_num_threads()


def test_a_package_that_is_not_installed_has_no_version():
    assert machine.version("a-package-that-nobody-has") is None


def test_the_assembler_has_the_version_that_triton_would_use():
    pytest.importorskip("triton")
    assert tuple(int(part) for part in machine.assembler(90).split(".")) >= (12, 8)


def test_no_other_file_looks_versions_up():
    looks = re.compile(r"metadata\.version\(|platform\.platform\(|\bgit_commit\(")
    files = [path for folder in ("xlstm_lm", "eval") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if looks.search(path.read_text())] == ["machine.py"]
