"""Compiled kernels in the folder of the node: what is kept there, and what becomes of a damaged entry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_lm.ops import build_cache, nvrtc


def test_a_binary_is_built_once_and_again_where_it_is_damaged(node_folder: Path) -> None:
    built: list[bytes] = []

    def build() -> bytes:
        built.append(b"binary %d" % len(built))
        return built[-1]

    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 0"
    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 0"
    assert build_cache.cached_binary(("source", "sm_100"), build) == b"binary 1"
    for path in (node_folder / "nvrtc").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 2"
    assert build_cache.cached_binary(("source", "sm_90"), build) == b"binary 2"
    assert len(list((node_folder / "nvrtc").iterdir())) == 2


def test_without_the_folder_kernels_are_built_each_time(node_folder: Path) -> None:
    node_folder.write_text("")
    built = iter([b"first", b"second"])
    assert [build_cache.cached_binary(("a",), lambda: next(built)) for _ in range(2)] == [b"first", b"second"]


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
def test_a_gpu_newer_than_nvrtc_gets_ptx(node_folder: Path, architecture: str, is_ptx: bool) -> None:
    binary = nvrtc.compile_cuda(SOURCE, "nothing", architecture, {})
    assert (b".target sm_90" in binary) == is_ptx
    assert (binary[:4] == b"\x7fELF") != is_ptx
    assert nvrtc.compile_cuda(SOURCE, "nothing", architecture, {}) == binary
    assert len(list((node_folder / "nvrtc").iterdir())) == 1
