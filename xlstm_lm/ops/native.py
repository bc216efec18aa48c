"""The C++ kernels of the CPU: all built into one library, once, and loaded into the first process that needs them.

The library is built in a folder of its own and moved to its final name in torch's extension directory when it is whole
and on the disk, so a build that is killed leaves nothing that a later process could load or wait for. Its size and
checksum stand beside it: the process would die of a library that was cut short or damaged later (SIGBUS).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from xlstm_lm.base.announce import announce_once
from xlstm_lm.base.durable_files import crc32_of, replace_durably
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.tracing import constant_result
from xlstm_lm.ops.native_operators import register_operators

_OPS = Path(__file__).parent
_SOURCES = [
    _OPS / path
    for path in (
        "mlstm/mlstm_cpu.cpp",
        "slstm/slstm_cpu.cpp",
        "gated_delta/gated_delta_cpu.cpp",
        "selective_scan/scan_cpu.cpp",
        "conv/conv_cpu.cpp",
    )
]
_HEADERS = [_OPS / name for name in ("by_dtype.h", "simd.h", "mlstm/chunk.h", "mlstm/problem.h", "slstm/cell.h")]
# Nothing that would let the compiler assume away infinities and NaNs: m = -inf is the empty state.
_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
_NATIVE_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_OPENMP_FLAGS = ["-fopenmp"] if platform.system() == "Linux" else []  # Apple's clang has none; one thread there


class KernelsUnavailableError(RuntimeError):
    """The kernels can be neither built nor loaded on this machine."""


def why_no_kernels() -> str | None:
    """Why the compiled kernels cannot be used here; None if they can. Builds them if need be."""
    problem = _load_once()
    return None if problem is None else f"no compiled CPU kernels: {problem}"


@constant_result
def load_kernels() -> None:
    """Load the kernels' library into this process, after building it where nobody has yet.

    Raises:
        KernelsUnavailableError: it can be neither built nor loaded; the message gives the reason and the remedy.
    """
    problem = _load_once()
    if problem is not None:
        raise KernelsUnavailableError(problem)


@functools.cache
def _load_once() -> str | None:
    """None when the library is loaded, else the problem; cached, because a failing build is not tried at every call."""
    problem = _load()
    if problem is None:
        register_operators()
    return problem


def _load() -> str | None:
    """None when the library is loaded, after building it where it is missing or damaged; else the problem."""
    try:
        path = _library_path()
        problem = damage(path)
        if problem:
            if path.exists():
                announce_once(f"{path} is not used: {problem}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with _only_one_process(path.parent / "building"):
                if damage(path):  # nobody else has built it meanwhile
                    for left_by_a_killed_process in path.parent.glob("build_*"):
                        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
                    _build(path)
                    return None
        torch.ops.load_library(path)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[-1])
        return (
            f"{reason} (the kernels need a C++20 compiler such as g++ 11 or newer, ninja, and a folder to write to, "
            "which TORCH_EXTENSIONS_DIR can name)"
        )
    return None


def _library_path() -> Path:
    """Path of the library for these sources, these flags, this torch and this processor."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    parts = [torch.__version__, platform.machine(), _processor_features(), _NATIVE_FLAG, *_FLAGS, *_OPENMP_FLAGS]
    parts += [source.read_text() for source in (*_SOURCES, *_HEADERS)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Path(root) / "xlstm_lm" / f"cpu_kernels_{digest}.so"


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def damage(path: Path) -> str:
    """The reason why a library must not be loaded: it is not the file that was built; empty if it is."""
    if not path.is_file():
        return "it is missing"
    try:
        recorded = read_json(_record_path(path), {"size": int, "crc32": int}, "")
    except ValueError as error:
        return f"its size and checksum are not known ({str(error).strip()})"
    size = path.stat().st_size
    if size != recorded["size"]:
        return f"it has {size} bytes instead of {recorded['size']}"
    return "" if crc32_of(path) == recorded["crc32"] else f"its checksum is not that in {_record_path(path).name}"


def _processor_features() -> str:
    """Features of the processor, on which `-march=native` depends: machines that share a home directory may differ."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def _only_one_process(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`; the system drops it with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(path: Path) -> None:
    """Compile the library, load it, and write it, with its size and checksum, to `path`."""
    from torch.utils import cpp_extension  # slow to import, and only needed here

    announce_once(f"building the CPU kernels, once, about a minute, into {path}")
    # A ninja from the registry is installed beside the interpreter, whose folder may not be on PATH.
    search_path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([search_path, str(Path(sys.executable).parent)])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build_") as folder:
            cpp_extension.load(
                name=path.stem,
                sources=[str(source) for source in _SOURCES],
                extra_cflags=[*_FLAGS, _NATIVE_FLAG, *_OPENMP_FLAGS],
                extra_ldflags=[*_OPENMP_FLAGS],  # it adds to this list
                build_directory=folder,
                is_python_module=False,
                with_cuda=False,
            )
            content = (Path(folder) / path.name).read_bytes()
            replace_durably(path, content)
            record = {"size": len(content), "crc32": zlib.crc32(content)}
            replace_durably(_record_path(path), json.dumps(record).encode())
    finally:
        os.environ["PATH"] = search_path
