"""The command that started this process, for the hints on how to go on."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MODULE = "xlstm_lm"
LAUNCHERS = ("torchrun", "deepspeed", "accelerate")


def program_command(launched: bool = False) -> list[str]:
    """The words that start this program: `xlstm-lm`, a path to it, or `python -m xlstm_lm`.

    With `launched`, under a launcher, those of the launcher with its own flags: `torchrun --nproc-per-node 2 -m
    xlstm_lm`.
    """
    by_launcher = (_launcher_command() or _described_launcher()) if launched and "RANK" in os.environ else None
    if by_launcher:
        return by_launcher
    if Path(sys.argv[0]).name == "xlstm-lm":
        return [short_name(sys.argv[0])]
    by_module = Path(sys.argv[0]).parts[-2:] == (MODULE, "__main__.py")
    return [short_name(sys.executable), "-m", MODULE] if by_module else ["xlstm-lm"]


def _launcher_command() -> list[str] | None:
    """A launcher's command line up to our module, from among the processes that this one descends from (on Linux)."""
    for words in _ancestors():
        names = [Path(word).name for word in words[:2]]
        launcher = next((index for index, name in enumerate(names) if name in LAUNCHERS), None)
        if launcher is None and words[1:3] == ["-m", "torch.distributed.run"]:
            launcher = 0
        # The program's own arguments are behind it, and may hold any word.
        ours = next((index for index, word in enumerate(words) if Path(word).name in (MODULE, "xlstm-lm")), None)
        if launcher is not None and ours is not None:
            return [short_name(words[launcher]), *words[launcher + 1 : ours + 1]]
    return None


def _described_launcher() -> list[str] | None:
    """The same from what torchrun or DeepSpeed left in the environment."""
    if "LOCAL_SIZE" in os.environ:
        return ["deepspeed", "--num_gpus", os.environ["LOCAL_SIZE"], "--module", MODULE]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    several = ["--nnodes", nodes, "--rdzv-endpoint", "HOST:PORT"] if nodes != "1" else []
    return ["torchrun", *several, "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", MODULE]


def _ancestors() -> list[list[str]]:
    """The command lines of the parent, its parent and so on, as far as the system shows them."""
    lines, process = [], os.getppid()
    while process > 1:
        folder = Path("/proc") / str(process)
        try:
            lines.append((folder / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1])
            process = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return lines


def short_name(path: str) -> str:
    """A program's name, where that is enough to find it."""
    there = shutil.which(Path(path).name)
    # Not the files that links lead to: an environment's python may be a link to the system's.
    return Path(path).name if there is not None and Path(there).absolute() == Path(path).absolute() else path
