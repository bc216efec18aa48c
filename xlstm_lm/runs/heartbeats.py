"""Signs of life of a run's ranks: a small file in each node's memory, and a summary of every node in the run's folder.

A rank writes its step and phase to a file of its own in the node's temporary folder, which costs no system call. The
node's monitor (`xlstm_lm.runs.monitor`) reads these files and writes RUN/heartbeats/NODE.json, which any machine can
read.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from xlstm_lm.base.read_files import NUMBER, read_json
from xlstm_lm.base.run_layout import HEARTBEATS

PHASES = ("start", "compile", "step", "validation", "save", "failed", "done")
"""Phases of a rank. compile is the first step; failed and done are the end."""
ENDED = ("failed", "done")
SUMMARY_SECONDS = 10.0
"""Time between two summaries for other machines, or a quarter of the shortest limit of a phase if that is less."""
SILENT_SECONDS = 6 * SUMMARY_SECONDS
"""Age from which a node's summary counts as silent."""
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("rank", "pid", "step"), int),
    **dict.fromkeys(("host", "phase"), str),
    "time": NUMBER,
}
Beat = tuple[str, int, float]
"""Phase, step and monotonic time in seconds."""
_RECORD = struct.Struct("<qqd")  # phase, step, monotonic time in seconds, which all processes of a node share


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The last sign of life of a rank."""

    rank: int
    host: str
    pid: int
    step: int
    """Steps made."""
    phase: str
    """One of PHASES."""
    time: float
    """Seconds since 1970 at the beat, by the clock of its node."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The beats of one node's ranks, as its monitor wrote them."""

    node: str
    """Name of the node, that of the file without its ending."""
    modified: float
    """Seconds since 1970 at the writing, by the clock of the file system."""
    written: float
    """Seconds since 1970 at the writing, by the clock of the node."""
    beats: list[Heartbeat]


class BeatFile:
    """The file to which a rank writes its beats."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_RECORD.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _RECORD.size)

    def write(self, phase: str, step: int) -> None:
        """Beat."""
        _RECORD.pack_into(self._memory, 0, PHASES.index(phase), step, time.monotonic())

    def close(self) -> None:
        """Close the file, which stays for the monitor to read and remove."""
        self._memory.close()


def read_beat(path: Path) -> Beat | None:
    """Phase, step and monotonic time of a rank's last beat; None before the first one, or without the file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < _RECORD.size:
        return None
    phase, step, beaten = _RECORD.unpack(content)
    return (PHASES[phase], step, beaten) if beaten else None


def write_heartbeats(run_dir: Path, node: str, beats: list[Heartbeat]) -> None:
    """Replace the summary of a node. Nothing is made if the run's folder is gone."""
    folder = run_dir / HEARTBEATS
    folder.mkdir(exist_ok=True)
    temporary = folder / f".tmp-{node}"
    temporary.write_text(json.dumps({"written": time.time(), "ranks": [asdict(beat) for beat in beats]}))
    temporary.replace(folder / _name(node))


def remove_heartbeats(run_dir: Path, node: str) -> None:
    """Remove the summary of a node, and the folder after the last one."""
    folder = run_dir / HEARTBEATS
    try:
        (folder / _name(node)).unlink()
        folder.rmdir()
    except OSError:  # other nodes still beat, or the run's folder has gone
        pass


def remove_all_heartbeats(run_dir: Path) -> None:
    """Remove the summaries of an earlier attempt, which nodes that were lost have left behind."""
    shutil.rmtree(run_dir / HEARTBEATS, ignore_errors=True)


def read_summary(path: Path) -> Summary:
    """Read the summary of a node.

    Raises:
        FileNotFoundError: the node has just ended.
        ValueError: the file is damaged; names it.
    """
    remedy = "Delete it: a run at work writes it again."
    with path.open("rb") as file:  # opened, because NFS keeps times of files that are not
        modified = os.fstat(file.fileno()).st_mtime
    content = read_json(path, {"written": NUMBER, "ranks": list}, remedy)
    beats = []
    for each in content["ranks"]:
        if not isinstance(each, dict) or not all(isinstance(each.get(key), type_) for key, type_ in _FIELDS.items()):
            raise ValueError(f"{path} is damaged: a rank lacks a field, or has one of the wrong type. {remedy}")
        beats.append(Heartbeat(**{key: each[key] for key in _FIELDS}))
        if beats[-1].phase not in PHASES:
            raise ValueError(f"{path} is damaged: a rank has the phase {beats[-1].phase!r}. {remedy}")
    return Summary(node=path.stem, modified=modified, written=content["written"], beats=beats)


def read_summaries(run_dir: Path) -> tuple[list[Summary], list[str]]:
    """Read the summaries of all nodes of a run at work, by file name.

    Returns:
        The sound summaries, and a sentence for each damaged file.
    """
    found, problems = [], []
    for path in sorted((run_dir / HEARTBEATS).glob("*.json")):
        try:
            found.append(read_summary(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as problem:
            if path.exists():
                problems.append(str(problem))
    return found, problems


def read_heartbeats(run_dir: Path) -> list[Heartbeat]:
    """Last beats of all ranks of a run that is at work, by rank; empty for one that is not.

    Raises:
        ValueError: a file is damaged; names it.
    """
    summaries, problems = read_summaries(run_dir)
    if problems:
        raise ValueError(problems[0])
    return sorted((beat for each in summaries for beat in each.beats), key=lambda beat: beat.rank)


def silent_nodes(run_dir: Path, seconds: float) -> list[str]:
    """Names of the nodes whose summary is older than the newest one by more than these seconds, by the disk's clock."""
    times = {path.stem: path.stat().st_mtime for path in (run_dir / HEARTBEATS).glob("*.json")}
    newest = max(times.values(), default=0.0)
    return sorted(node for node, written in times.items() if newest - written > seconds)


def _name(node: str) -> str:
    return f"{node.replace(os.sep, '_')}.json"
