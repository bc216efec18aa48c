"""The state of a run in status.json, by which launch scripts decide on a requeue. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from xlstm_lm.base.durable_files import replace_durably
from xlstm_lm.base.durations import utc_now
from xlstm_lm.base.errors import LOST_CONNECTION
from xlstm_lm.base.read_files import Fields, read_json
from xlstm_lm.base.run_layout import STATUS

STATES = ("running", "finished", "stopped", "preempted", "failed")
IDLE_ATTEMPTS = 3
"""Attempts in a row without a step, after which a run is not started again."""
_FIELDS: Fields = {
    **dict.fromkeys(("state", "reason", "updated"), str),
    **dict.fromkeys(("step", "steps", "attempt"), int),
    "attempts": list,
}
ENDED_AT_ONCE = "ended the run at once."
"""End of the reason of a run that a signal ended before it could save; the signal's name stands before it."""
_REMEDY = "Delete the file: the run writes it again when it starts."


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The content of status.json."""

    state: str
    """One of STATES."""
    reason: str
    """A sentence."""
    step: int
    """Steps made."""
    steps: int
    """Steps of the whole run."""
    attempt: int
    """Number of this start, from 1."""
    updated: str
    """Time of writing, as ISO 8601 in UTC."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Starts so far: attempt, from_step, to_step, state, reason, host and started of each."""
    requeue: bool = False
    """Whether the state allows another start."""


def read_status(run_dir: Path) -> RunStatus | None:
    """Read status.json of a run; None without the file.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = run_dir / STATUS
    if not path.is_file():
        return None
    content = read_json(path, _FIELDS, _REMEDY)
    if content["state"] not in STATES:
        raise ValueError(f"{path} is damaged: its state is {content['state']!r}, not one of {STATES}. {_REMEDY}")
    if not all(isinstance(each, dict) for each in content["attempts"]):
        raise ValueError(f"{path} is damaged: not all of its attempts are objects. {_REMEDY}")
    if not isinstance(content.get("requeue"), bool):
        raise ValueError(f"{path} is damaged: its requeue is {content.get('requeue')!r}. {_REMEDY}")
    return RunStatus(**{name: content[name] for name in (*_FIELDS, "requeue")})


def write_status(run_dir: Path, status: RunStatus) -> None:
    """Replace status.json of a run."""
    replace_durably(run_dir / STATUS, json.dumps(asdict(status), indent=1).encode())


def certainty(reason: str) -> int:
    """Rank of a reason among those that several processes give for the end of one attempt; the highest counts.

    A lost connection (0) may follow from anything. SIGTERM (1) may come from a launcher that has lost a process.
    """
    if reason.startswith(LOST_CONNECTION):
        return 0
    return 1 if reason == f"SIGTERM {ENDED_AT_ONCE}" else 2


def has_ended_early(status: RunStatus) -> bool:
    """Whether an attempt has ended on some rank without a save on which all ranks agreed."""
    return status.state == "failed" or status.reason.endswith(ENDED_AT_ONCE)


def may_replace(status: RunStatus, reason: str) -> bool:
    """Whether the reason for an end of the same attempt may replace its status: the more certain reason stays."""
    return status.state == "running" or certainty(reason) > certainty(status.reason)


def record_end(run_dir: Path, attempt: int, state: str, reason: str, requeue: bool = True) -> None:
    """Record the end of an attempt from outside rank 0, unless a reason of at least the same certainty is there.

    Args:
        run_dir: Folder of the run.
        attempt: Number of the attempt, which rank 0 must have recorded.
        state: failed, stopped or preempted.
        reason: One sentence.
        requeue: Whether another start is worthwhile.

    Raises:
        ValueError: status.json is damaged.
        RunError: it cannot be written.
    """
    status = read_status(run_dir)
    if status is None or status.attempt != attempt or not may_replace(status, reason):
        return
    attempts = [
        each | {"state": state, "reason": reason} if each.get("attempt") == attempt else each
        for each in status.attempts
    ]
    ended = replace(status, state=state, reason=reason, updated=utc_now(), attempts=attempts, requeue=requeue)
    write_status(run_dir, ended)


def should_requeue(status: RunStatus | None) -> tuple[bool, str]:
    """Decide whether a run that is not at work should be started again. Returns the decision and a sentence for it."""
    if status is None:
        return False, "the run has no status.json, which it writes when it starts: why it ended is not known."
    if status.state == "finished":
        return False, f"the run has made its {status.steps:,} steps."
    recent = status.attempts[-IDLE_ATTEMPTS:]
    if len(recent) == IDLE_ATTEMPTS and all(each.get("to_step") == each.get("from_step") for each in recent):
        return False, f"the last {IDLE_ATTEMPTS} attempts made no step; the last reason: {status.reason}"
    if status.state == "running":
        return True, f"it was killed at or after step {status.step:,} without a word."
    return status.requeue, f"{status.state} at step {status.step:,}: {status.reason}"
