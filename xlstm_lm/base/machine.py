"""The machine that this process runs on, its memory above all, and the source that it runs."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
