"""The node's folder for compiled kernels: whose it is, what is kept in it, and what becomes of a damaged entry."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xlstm_lm.ops import build_cache, nvrtc


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The node's folder, not there yet, in a temporary directory of the test's own."""
    monkeypatch.setattr(build_cache.tempfile, "tempdir", str(tmp_path))
    build_cache.node_local_folder.cache_clear()
    yield tmp_path / f"xlstm_lm-{os.getuid()}"
    build_cache.node_local_folder.cache_clear()


def test_the_folder_is_this_users_alone(place: Path) -> None:
    assert build_cache.node_local_folder() == place
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_folder_that_others_could_write_to_is_not_used(
    place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(build_cache, "announce_once", said.append)
    if kind == "open to others":
        place.mkdir()
        place.chmod(0o777)
    elif kind == "a link":
        (place.parent / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(place.parent / "elsewhere")
    else:
        place.write_text("")
    assert build_cache.node_local_folder() is None
    assert str(place) in said[0]
    assert build_cache.cached_binary(("a",), lambda: b"built") == b"built"


def test_a_binary_is_built_once_and_again_where_it_is_damaged(place: Path) -> None:
    built: list[bytes] = []

    def build() -> bytes:
        built.append(b"binary %d" % len(built))
        return built[-1]

    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 0"
    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 0"
    assert build_cache.cached_binary(("source", "sm_100"), build) == b"binary 1"
    for path in (place / "nvrtc").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 2"
    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 2"
    assert len(list((place / "nvrtc").iterdir())) == 2


def test_triton_caches_on_the_node_unless_told_otherwise(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import xlstm_lm.ops, os; print(os.environ['TRITON_CACHE_DIR'])"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    environment["TMPDIR"] = str(tmp_path)
    run = lambda **more: subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True)
    folder = tmp_path / f"xlstm_lm-{os.getuid()}"
    assert run(TRITON_CACHE_DIR="/elsewhere").stdout.strip() == "/elsewhere"
    assert folder.stat().st_mode & 0o777 == 0o700, "made before a compiler could make it with access for others"
    assert run().stdout.strip() == str(folder / "triton")


SOURCE = 'extern "C" __global__ void nothing() {}'


@pytest.mark.parametrize(("architecture", "is_ptx"), [("sm_90", False), ("sm_999", True)])
def test_a_gpu_newer_than_nvrtc_gets_ptx(place: Path, architecture: str, is_ptx: bool) -> None:
    binary = nvrtc.compile_cuda(SOURCE, "nothing", architecture, {})
    assert (b".target sm_90" in binary) == is_ptx
    assert (binary[:4] == b"\x7fELF") != is_ptx
    assert nvrtc.compile_cuda(SOURCE, "nothing", architecture, {}) == binary
    assert len(list((place / "nvrtc").iterdir())) == 1
