"""The ranks of a run as their heartbeats show them: a summary of hundreds, and only those that stand out by name."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xlstm_lm.base.durations import duration
from xlstm_lm.runs.heartbeats import ENDED, PHASES, SILENT_SECONDS, Heartbeat, read_summaries

LATE = 4.0
"""Ages of the middle rank, beyond which a rank is late."""
LATE_SECONDS = 30.0
"""Age from which a rank can be late: below, it differs by the times at which nodes write their summaries."""
NAMED = 4
"""Ranks and nodes that are named at most, each kind."""


@dataclass(frozen=True)
class RankSeen:
    """A rank and the age of its last beat."""

    beat: Heartbeat
    age: float
    """Seconds since the last beat. A rank beats at the begin of each step and phase."""

    @property
    def place(self) -> tuple[int, int]:
        """Order in which ranks pass: steps made, and the number of the phase."""
        return self.beat.step, PHASES.index(self.beat.phase)

    def __str__(self) -> str:
        beat = self.beat
        where = f"rank {beat.rank} on {beat.host}, process {beat.pid}"
        return f"{where}: {beat.phase} after step {beat.step:,}, beat {duration(self.age)} ago"


@dataclass(frozen=True)
class NodeSeen:
    """A node and the age of its summary."""

    name: str
    ranks: list[int]
    age: float
    """Seconds since its monitor wrote."""

    def __str__(self) -> str:
        return f"{self.name}, {_ranks(self.ranks)}: its monitor wrote {duration(self.age)} ago"


@dataclass(frozen=True)
class RanksSeen:
    """All ranks of a run that beat, or were left behind by nodes that no longer do."""

    ranks: list[RankSeen]
    """By rank."""
    silent: list[NodeSeen]
    """Nodes whose monitor does not write any more."""

    @property
    def is_heard(self) -> bool:
        """Whether the monitor of any node still writes."""
        return sum(len(node.ranks) for node in self.silent) < len(self.ranks)

    @property
    def working(self) -> list[RankSeen]:
        """Ranks that have not ended."""
        return [each for each in self.ranks if each.beat.phase not in ENDED]

    @property
    def slowest(self) -> RankSeen | None:
        """The rank at work that is the furthest behind, of several the one that has not beaten for longest."""
        return min(self.working, key=lambda each: (each.place, -each.age), default=None)

    @property
    def outliers(self) -> list[RankSeen]:
        """Ranks that failed, and ranks for which the others wait.

        Ranks wait for each other in every step. While they move, a rank is an outlier if its beat is older than
        `LATE` times that of the middle rank. Once most have not beaten for `SILENT_SECONDS`, those behind are.
        Ranks of silent nodes are left out: the node is named.
        """
        failed = [each for each in self.ranks if each.beat.phase == "failed"]
        unheard = {rank for node in self.silent for rank in node.ranks}
        working = [each for each in self.working if each.beat.rank not in unheard]
        if len(working) < 2:
            return failed
        middle = statistics.median_low([each.age for each in working])
        late = [each for each in working if each.age > max(LATE * middle, LATE_SECONDS)]
        if not late and middle > SILENT_SECONDS:
            last = min(each.place for each in working)
            behind = [each for each in working if each.place == last]
            late = behind if len(behind) < len(working) else []
        return failed + late


def look_at_ranks(run_dir: Path, now: float) -> tuple[RanksSeen, list[str]]:
    """Read the heartbeats of a run.

    Args:
        run_dir: Folder of the run.
        now: Seconds since 1970, by the clock of the folder's file system.

    Returns:
        The ranks, none of a run that is not at work, and a sentence for each damaged file.
    """
    summaries, problems = read_summaries(run_dir)
    ranks, silent = [], []
    for summary in summaries:
        age = max(now - summary.modified, 0.0)
        # The clocks of nodes differ: each is only compared with itself.
        ranks += [RankSeen(beat, age + max(summary.written - beat.time, 0.0)) for beat in summary.beats]
        if age > SILENT_SECONDS:
            silent.append(NodeSeen(summary.node, sorted(beat.rank for beat in summary.beats), age))
    return RanksSeen(sorted(ranks, key=lambda each: each.beat.rank), silent), problems


def rank_lines(seen: RanksSeen) -> list[str]:
    """Lines of the page about a run: a summary, the slowest rank, ranks that stand out, and silent nodes."""
    if not seen.ranks:
        return []
    if len(seen.ranks) == 1:
        lines = [f"  beat        {seen.ranks[0]}"]
    else:
        lines = [f"  ranks       {_summary(seen)}"]
        outliers = seen.outliers
        if not outliers and seen.slowest is not None:
            lines.append(f"  slowest     {seen.slowest}")
        lines += _named("stands out", outliers)
    return lines + _named("silent", seen.silent)


def _summary(seen: RanksSeen) -> str:
    hosts = len({each.beat.host for each in seen.ranks})
    phases = Counter(each.beat.phase for each in seen.ranks)
    steps = [each.beat.step for each in seen.ranks]
    low, high = min(steps), max(steps)
    parts = [
        ", ".join(f"{count} in {phase}" for phase, count in phases.most_common()),
        f"after step {low:,}" if low == high else f"after steps {low:,} to {high:,}",
        f"newest beat {duration(min(each.age for each in seen.ranks))} ago",
    ]
    if not seen.is_heard:
        parts.append("no node writes any more")
    return f"{len(seen.ranks)} on {hosts} host{'s' * (hosts > 1)}: {', '.join(parts)}"


def _named(title: str, each_seen: Iterable[object]) -> list[str]:
    names = [str(each) for each in each_seen]
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return [f"  {title:<11} {name}" for name in [*names[:NAMED], *more]]


def _ranks(ranks: list[int]) -> str:
    """The ranks of a node in words; they follow each other, as launchers number them."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
