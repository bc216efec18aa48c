"""A file in the current folder is never executed for having the name of a module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_lm.base.import_path import PROJECT, child_environment, import_path, keep_current_folder_out

NAMES = "queue json argparse datasets torch numpy yaml tqdm transformers pickle __future__".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with modules that must not be imported."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    executed = tmp_path / "executed"
    assert not executed.exists(), executed.read_text()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (("xlstm_lm", "generate", "--model", "nowhere", "--prompt", "x"), "nowhere does not exist"),
        (("eval.perplexity", "--help"), "usage"),
    ],
)
def test_python_m(folder, program, expected):
    # Without an empty entry, with which Python's own start already imports from there for an editable install.
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    done = subprocess.run([sys.executable, "-m", *program], env=environment, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr


def test_a_data_worker(folder, monkeypatch):
    from xlstm_lm.data.worker import Worker

    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as of python -c and a notebook
    worker = Worker([], [], 1)
    assert next(worker) == []
    worker.close()


def test_a_child_finds_what_this_process_finds_and_nothing_in_the_current_folder(folder, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "found_there.py").touch()
    monkeypatch.setattr(sys, "path", ["", str(folder), str(elsewhere), *sys.path])
    code = "import queue, found_there, xlstm_lm; print(queue.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    assert Path(done.stdout.strip()).parent == Path(os.__file__).parent, done.stderr


def test_the_project_may_be_the_current_folder(monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    keep_current_folder_out()
    assert sys.path[0] == PROJECT
    # Children do not look in the current folder by themselves any more.
    assert os.environ["PYTHONPATH"] == os.pathsep.join([PROJECT, "/elsewhere"])
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_the_folders_of_the_library_stay_wherever_one_stands(monkeypatch):
    library = os.path.dirname(os.__file__)  # noqa: PTH120
    monkeypatch.chdir(library)
    monkeypatch.setattr(sys, "path", ["", library, *[each for each in sys.path if each != library]])
    assert library in import_path()


def test_a_current_folder_that_is_gone_is_no_error(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "" not in import_path()
