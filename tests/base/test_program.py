"""A command ends with one message and the right exit code."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.program import program, told_once

ROOT = Path(__file__).parents[2]


def heed_interrupts() -> None:
    """Undo, in a new process, that a shell which puts the tests in the background has them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ending(code: str, **options) -> tuple[int, str, str]:
    """How a program ends: exit code, standard output and error."""
    script = "import os, signal, sys\nfrom xlstm_lm.base.program import program\nwith program('xlstm-lm train'):\n"
    script += "".join(f"    {line}\n" for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=heed_interrupts, **options
    )
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_and_sigterm_clean_up_and_leave_no_trace():
    clean = "try:\n    os.kill(os.getpid(), signal.SIG{})\nfinally:\n    print('cleaned up')"
    assert ending(clean.format("INT")) == (130, "cleaned up\n", "xlstm-lm train: interrupted\n")
    assert ending(clean.format("TERM")) == (143, "cleaned up\n", "")


STUDIES = sorted(path for path in (ROOT / "eval").rglob("*.py") if 'if __name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_study_ends_like_a_command(path):
    assert re.search(r"^(@|    with )program\(", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("at", ["import torch", "torch.set_num_threads(options.threads)"])
def test_ctrl_c_in_a_study_leaves_no_trace(at, tmp_path):
    shutil.copytree(ROOT / "eval", tmp_path / "eval", ignore=shutil.ignore_patterns("results"))
    study = tmp_path / "eval" / "kernels.py"
    interrupt = "import os; os.kill(os.getpid(), 2)"
    study.write_text(study.read_text().replace(at, f"{interrupt}; {at}", 1))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "eval.kernels", "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, preexec_fn=heed_interrupts
    )
    expected = (-2, "") if "import" in at else (130, "eval.kernels: interrupted\n")
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error_of_the_program(buffered):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    script = "from xlstm_lm.base.program import program\nwith program('x'):\n    print('x' * 100_000)"
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_output_is_one_message():
    script = "from xlstm_lm.base.program import program\nwith program('x'):\n    print('text')"
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "x: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_characters_that_the_output_does_not_have(settings):
    code, out, _ = ending("print('gr\\u00fcn \\u20ac')", env={**os.environ, **settings}, encoding="latin-1")
    assert code == 0
    assert out.endswith("n ?\n")


def test_errors_and_their_codes(capsys, monkeypatch):
    for error, code in ((ValueError("wrong"), 2), (OSError("gone"), 2), (RunError("over"), 1)):
        with pytest.raises(SystemExit) as stopped, program("xlstm-lm train"):
            raise error
        assert stopped.value.code == code
        assert capsys.readouterr().err == f"xlstm-lm train: {error}\n"
    with pytest.raises(ZeroDivisionError), program("xlstm-lm train"):
        raise ZeroDivisionError
    monkeypatch.setenv("XLSTM_LM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"), program("xlstm-lm train"):
        raise ValueError("wrong")


def test_of_many_processes_with_one_error_the_first_tells_it(capsys, monkeypatch):
    for rank, shared, expected in (("0", True, "x: wrong\n"), ("3", True, ""), ("3", False, "x, rank 3: wrong\n")):
        monkeypatch.setenv("RANK", rank)
        error = ValueError("wrong")
        with pytest.raises(SystemExit), program("x"):
            raise told_once(error) if shared else error
        assert capsys.readouterr().err == expected


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with program("x"):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
