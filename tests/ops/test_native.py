"""Building the compiled kernels: without a compiler, by several processes at once, and after a killed build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from xlstm_lm.base.announce import announce_once
from xlstm_lm.ops import native

CHOOSE = """
import torch
from xlstm_lm.ops.slstm import SLSTM, slstm
wx = torch.zeros(1, 2, 4, 1, 3)
name = lambda: SLSTM.backend_for((wx,), D=3).name
print(name(), name(), slstm(wx, torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 3)).sum().item())
"""


def start(extensions: Path, **environment: str) -> subprocess.Popen:
    """A fresh process that asks for the kernel, with torch's extension directory at `extensions`."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "MAX_JOBS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", CHOOSE],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


def test_without_a_compiler_the_definition_runs_and_says_so_once(tmp_path):
    output, log = start(tmp_path, CXX="/nonexistent/c++").communicate(timeout=120)
    assert output.split() == ["batched", "batched", "0.0"]
    assert log.count("no compiled CPU kernels") == log.count("(`batched`), which is slower") == 1
    assert "C++20 compiler" in log


def test_an_extension_directory_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    output, log = start(blocked).communicate(timeout=120)
    assert output.split()[0] == "batched"
    assert str(blocked) in log


WHOLE = b"a library, as it was built"


@pytest.mark.parametrize(
    ("library", "record", "reason"),
    [
        (WHOLE, {"size": len(WHOLE), "crc32": zlib.crc32(WHOLE)}, None),
        (None, None, ""),
        (WHOLE[:-5], {"size": len(WHOLE), "crc32": zlib.crc32(WHOLE)}, "it has 21 bytes instead of 26"),
        (WHOLE[:-1] + b"?", {"size": len(WHOLE), "crc32": zlib.crc32(WHOLE)}, "its checksum is not that in"),
        (WHOLE, None, "its size and checksum are not known"),
        (WHOLE, {"size": "26"}, "its size and checksum are not known"),
    ],
    ids=["whole", "none", "cut short", "damaged", "without a record", "with a damaged record"],
)
def test_only_the_library_that_was_built_is_loaded(library, record, reason, tmp_path, monkeypatch, caplog):
    announce_once.cache_clear()
    path = tmp_path / "cache" / "cpu_kernels.so"
    path.parent.mkdir()
    if library is not None:
        path.write_bytes(library)
    if record is not None:
        path.with_suffix(".json").write_text(json.dumps(record))
    built, loaded = [], []
    monkeypatch.setattr(native, "_library_path", lambda: path)
    monkeypatch.setattr(native, "_build", built.append)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert native._load() is None
    assert (built, loaded) == (([], [path]) if reason is None else ([path], []))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [] if not reason else f"{path} is not used: {reason}" in messages[0]


@pytest.mark.slow
def test_a_killed_build_neither_blocks_nor_misleads_the_next_processes(tmp_path):
    killed = start(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("xlstm_lm/*/build.ninja")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2.0)  # into the compiler's run
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not list(tmp_path.glob("xlstm_lm/*.so"))

    both = [start(tmp_path), start(tmp_path)]
    results = [process.communicate(timeout=400) for process in both]
    assert [output.split()[0] for output, _ in results] == ["compiled", "compiled"]
    assert sum(log.count("building the CPU kernels") for _, log in results) == 1
    # The lock; the library, with its size and checksum.
    assert sorted(path.suffix for path in (tmp_path / "xlstm_lm").iterdir()) == ["", ".json", ".so"]
