"""A page about a run, from the files of its folder alone: any machine that sees the folder prints it, without torch."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlstm_lm.base.durations import duration
from xlstm_lm.base.lease import LEASE_FILE, STALE_SECONDS, Holder, file_system_time
from xlstm_lm.base.read_files import read_json
from xlstm_lm.base.run_layout import MANIFEST, holds_run
from xlstm_lm.runs.checkpoint_files import file_damage
from xlstm_lm.runs.folder import RunFolder
from xlstm_lm.runs.ranks_seen import RanksSeen, look_at_ranks, rank_lines
from xlstm_lm.runs.status import RunStatus, read_status
from xlstm_lm.runs.text_curve import ASCII_BLOCKS, BLOCKS, draw_text_curve

EVENTS = 5
"""Events that the page shows, the newest."""
SPEED_RECORDS = 20
"""Logged steps over which the time that is left is estimated."""
BEYOND = 1e30
"""Losses from here on are left out of the curve."""


@dataclass(frozen=True)
class LeaseSeen:
    """The lease of a run's folder."""

    holder: Holder | None
    """The process that holds it; None if the file cannot be read."""
    age: float
    """Seconds since its last beat, by the clock of the file system."""

    @property
    def beats(self) -> bool:
        """Whether the holder is at work, as far as can be told from this machine."""
        return self.age <= STALE_SECONDS and not (self.holder is not None and self.holder.is_gone())


@dataclass(frozen=True)
class CheckpointSeen:
    """The newest checkpoint of a run, looked at by names and sizes."""

    folder: Path
    step: int
    age: float
    """Seconds since it was finished."""
    problem: str
    """Damage that names and sizes show; empty if there is none."""


@dataclass
class Overview:
    """The files of a run's folder at one moment."""

    folder: RunFolder
    state: str
    """State in status.json, or dead for a run that should beat and does not."""
    reason: str
    status: RunStatus | None
    steps: int | None
    """Steps of the whole run; None if that is not known."""
    lease: LeaseSeen | None
    checkpoint: CheckpointSeen | None
    ranks: RanksSeen
    """Heartbeats of the ranks; empty for a run that is not at work."""
    records: list[dict[str, Any]]
    """Sound lines of metrics.jsonl."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each file that is damaged or surprising."""

    def of_split(self, split: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of one split, first to last."""
        return [record for record in self.records if record["split"] == split]

    @property
    def step(self) -> int:
        """Last step that any file of the run names."""
        named = [record["step"] for record in self.of_split("train")[-1:]]
        named += [self.status.step] if self.status else []
        return max([*named, self.checkpoint.step if self.checkpoint else 0])

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at the pace of the last logged steps; None if that cannot be told."""
        train = [each for each in self.of_split("train") if isinstance(each.get("elapsed_seconds"), (int, float))]
        train = train[-SPEED_RECORDS:]
        if not self.steps or len(train) < 2 or train[-1]["step"] <= train[0]["step"]:
            return None
        pace = (train[-1]["elapsed_seconds"] - train[0]["elapsed_seconds"]) / (train[-1]["step"] - train[0]["step"])
        return max(self.steps - self.step, 0) * pace


def look_at(run_dir: Path) -> Overview:
    """Read where a run stands. Damaged files become `problems`.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is {'a file' if run_dir.exists() else 'not there'}; give the folder of a run.")
    problems: list[str] = []
    status = _tried(problems, lambda: read_status(run_dir))
    folder = RunFolder(run_dir)
    if status is None and not holds_run(run_dir) and not (run_dir / LEASE_FILE).exists():
        raise ValueError(
            f"{run_dir} holds no run: it has neither {folder.config_path.name} nor metrics nor checkpoints. Give the "
            "folder that training.run_dir names."
        )
    config = _tried(problems, folder.config) or {}
    training = config.get("training", {})
    steps = training.get("steps") if isinstance(training.get("steps"), int) else None
    made_as = training.get("run_dir")
    if isinstance(made_as, str) and Path(made_as).is_absolute() and Path(made_as).resolve() != run_dir.resolve():
        problems.append(f"The folder was moved or copied: the run was made in {made_as}.")
    records, damaged = folder.sound_metrics()
    problems += damaged
    now = _now_in(run_dir)
    lease = _lease_in(run_dir, now)
    ranks, damaged = look_at_ranks(run_dir, now)
    problems += damaged
    checkpoint = _newest_checkpoint(folder, now)
    if checkpoint and checkpoint.problem:
        problems.append(checkpoint.problem)
    seen = Overview(
        folder=folder,
        state="",
        reason="",
        status=status,
        steps=status.steps if status else steps,
        lease=lease,
        checkpoint=checkpoint,
        ranks=ranks,
        records=records,
        problems=problems,
    )
    seen.state, seen.reason = _state_of(seen)
    return seen


def _state_of(seen: Overview) -> tuple[str, str]:
    """State of a run and the reason, a sentence."""
    status, lease = seen.status, seen.lease
    beats = lease is not None and lease.beats
    if status is None:
        if beats:
            return "running", "Its process beats; it has no readable status.json."
        if lease is not None:
            return "dead", f"Its process left {LEASE_FILE} behind and does not beat."
        if seen.steps and seen.checkpoint and seen.checkpoint.step >= seen.steps:
            return "finished", "Its last step is saved; it has no readable status.json."
        return (
            "stopped",
            "No process beats, and it has no readable status.json." if seen.step else "It has made no step yet.",
        )
    if status.state == "running" and not beats:
        silent = f"has not beaten for {duration(lease.age)}" if lease and lease.age > STALE_SECONDS else "has ended"
        return "dead", f"It is marked as running, but its process {silent} without saying how it went."
    return status.state, status.reason


def _lease_in(run_dir: Path, now: float) -> LeaseSeen | None:
    path = run_dir / LEASE_FILE
    try:
        with path.open("rb") as file:  # opened, because NFS keeps times of files that are not
            age = now - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    try:
        return LeaseSeen(Holder(**read_json(path)), max(age, 0.0))
    except (TypeError, ValueError):
        return LeaseSeen(None, max(age, 0.0))


def _now_in(folder: Path) -> float:
    """Time of the folder's file system; this machine's, which may differ, where nothing can be written."""
    try:
        return file_system_time(folder)
    except OSError:
        return time.time()


def _newest_checkpoint(folder: RunFolder, now: float) -> CheckpointSeen | None:
    for step, path in folder.checkpoints().items():
        manifest = path / MANIFEST
        problem, age = "", 0.0
        try:
            age = now - (manifest if manifest.exists() else path).stat().st_mtime
            problem = file_damage(path, read_json(manifest, {"files": dict}, "")["files"], checksums=False)
        except (OSError, ValueError) as error:
            problem = str(error).strip()
        return CheckpointSeen(path, step, max(age, 0.0), problem)
    return None


def _tried(problems: list[str], read: Any) -> Any:
    """The result of `read`; None, with its error among the problems, if a file is damaged."""
    try:
        return read()
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return None


def one_line(seen: Overview) -> str:
    """Where a run stands, in one line."""
    parts = [f"{seen.folder.path}: {seen.state}", f"step {seen.step:,}" + (f" of {seen.steps:,}" if seen.steps else "")]
    train = seen.of_split("train")
    if train and train[-1].get("loss") is not None:
        parts.append(f"loss {train[-1]['loss']:.4f}")
    if seen.state == "running" and seen.seconds_left is not None:
        parts.append(f"{duration(seen.seconds_left)} left")
    if seen.ranks.outliers:
        parts.append(str(seen.ranks.outliers[0]))
    if seen.problems:
        parts.append(f"{len(seen.problems)} problem{'s' * (len(seen.problems) > 1)}")
    return ", ".join(parts)


def page(seen: Overview, *, width: int | None = None, unicode: bool = True) -> str:
    """The page about a run.

    Args:
        seen: The run.
        width: Characters of a line; None for the terminal's.
        unicode: Whether the curve may use blocks; otherwise it is ASCII.
    """
    width = width or shutil.get_terminal_size((80, 24)).columns
    share = f" of {seen.steps:,} ({seen.step / seen.steps:.0%})" if seen.steps else ""
    lines = [f"{seen.folder.path}", f"  state       {': '.join(filter(None, [seen.state, seen.reason]))}"]
    if seen.status:
        lines.append(f"  attempt     {seen.status.attempt}, status of {seen.status.updated}")
    lines.append(f"  step        {seen.step:,}{share}")
    lines += _progress_lines(seen) + _beat_lines(seen)
    lines += rank_lines(seen.ranks) or ["  ranks       none has beaten yet"] * (seen.state == "running")
    if seen.checkpoint:
        intact = "damaged" if seen.checkpoint.problem else "all files there, with their sizes"
        saved = f"step {seen.checkpoint.step:,}, {duration(seen.checkpoint.age)} ago"
        lines.append(f"  checkpoint  {saved}, {intact}")
    else:
        lines.append("  checkpoint  none yet")
    lines += [f"  problem     {each}" for each in seen.problems]
    events = seen.of_split("event")
    lines += [f"  event       step {each['step']:,}: {each.get('message', '')}" for each in events[-EVENTS:]]
    train = [(each["step"], each.get("loss")) for each in seen.of_split("train")]
    points = [(step, loss) for step, loss in train if loss is not None and abs(loss) < BEYOND]
    if len(points) > 1:
        lines += ["", "loss over steps"]
        lines += draw_text_curve(sorted(points), width=width, blocks=BLOCKS if unicode else ASCII_BLOCKS)
    return "\n".join(lines)


def _progress_lines(seen: Overview) -> list[str]:
    lines = []
    train, validation = seen.of_split("train"), seen.of_split("validation")
    if train:
        last = train[-1]
        rate = last.get("tokens_per_second")
        lines.append(f"  loss        {_losses(last)} at step {last['step']:,}")
        if validation:
            lines.append(f"  validation  {_losses(validation[-1])} at step {validation[-1]['step']:,}")
        speed = [f"{rate:,.0f} tokens/s"] if rate is not None else []
        if isinstance(last.get("mfu"), float):
            speed.append(f"MFU {last['mfu']:.1%}")
        if isinstance(last.get("slowest_host"), str):
            speed.append(f"slowest rank on {last['slowest_host']}")
        lines.append(f"  speed       {', '.join(speed) or 'not known'}")
        if seen.seconds_left:
            until = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=seen.seconds_left)
            ends = f", at {until:%Y-%m-%d %H:%M}" if seen.state == "running" else " of training, once it runs again"
            lines.append(f"  time left   {duration(seen.seconds_left)}{ends}")
    else:
        lines.append("  loss        no step logged yet")
    return lines


def _losses(record: dict[str, Any]) -> str:
    numbers = {"": "loss", " bits/byte": "bits_per_byte"}
    shown = [f"{record[key]:.4f}{unit}" for unit, key in numbers.items() if record.get(key) is not None]
    return ", ".join(shown) or "not finite"


def _beat_lines(seen: Overview) -> list[str]:
    lines = []
    if seen.lease is None:
        lines.append("  process     none holds the folder")
    else:
        who = f"process {seen.lease.holder.pid} on {seen.lease.holder.host}" if seen.lease.holder else "unknown process"
        lines.append(f"  process     {who}, {'' if seen.lease.beats else 'dead, '}beat {duration(seen.lease.age)} ago")
    return lines
