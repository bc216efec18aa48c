"""The machine that this process runs on, its memory, and the source and packages that it runs."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

CGROUPS = Path("/sys/fs/cgroup")
PACKAGES = (
    *("xlstm-lm", "torch", "deepspeed", "datasets", "transformers", "tokenizers", "numpy", "wandb", "triton"),
    *("mamba-ssm", "causal-conv1d"),
)
"""Packages whose versions may change a result or its speed."""


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has: a GPU's own; of a CPU the host's, or what its container or job may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> list[int]:
    """Memory limits of the control groups (version 2 and 1) that this process is in."""
    own = Path("/proc/self/cgroup")
    paths = [CGROUPS / "memory/memory.limit_in_bytes", CGROUPS / "memory.max"]
    for line in own.read_text().splitlines() if own.is_file() else ():
        group = line.split(":", 2)[2].strip("/")
        paths += [CGROUPS / above / "memory.max" for above in (Path(group), *Path(group).parents)]
    texts = [path.read_text().strip() for path in dict.fromkeys(paths) if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a GPU or in the host."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def cpu_name() -> str:
    """The processor's own name, where the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this source, with -dirty where it was edited.

    Outside of a repository the variable GIT_COMMIT, or None.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT")


def version(package: str) -> str | None:
    """Installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def assembler(capability: int) -> str | None:
    """Version of the assembler with which Triton writes machine code for a compute capability, such as 90 for 9.0.

    None without Triton, or where it finds no such tool.
    """
    if version("triton") is None:
        return None
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return get_ptxas(capability).version
    except RuntimeError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Describe source, packages and hardware of this process, as JSON holds it; a missing thing is None.

    Args:
        device: the device that it computes on.
    """
    capability = 0
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "assembler": assembler(capability) if capability else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
