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


@pytest.mark.parametrize(
    ("printed", "release"), [("Cuda compilation tools, release 12.8, V12.8.93", "12.8"), ("", None)]
)
def test_the_assembler_is_asked_for_its_release(printed, release, tmp_path, monkeypatch):
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f"#!/bin/sh\necho '{printed}'\n")
    ptxas.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.assembler() == release


def test_no_other_file_looks_versions_up():
    looks = re.compile(r"metadata\.version\(|platform\.platform\(|\bgit_commit\(")
    files = [path for folder in ("xlstm_lm", "eval") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if looks.search(path.read_text())] == ["machine.py"]
