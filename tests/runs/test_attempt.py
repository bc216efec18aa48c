from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.base.errors import LOST_CONNECTION
from xlstm_lm.base.run_layout import STATUS
from xlstm_lm.parallel.process_group import LostProcessError
from xlstm_lm.runs import attempt as module
from xlstm_lm.runs.attempt import KILLED, Attempt
from xlstm_lm.runs.status import RunStatus, read_status, record_end, should_requeue


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(module, "FIRST_HAND_SECONDS", 0.0)


def begin(folder: Path, step: int = 0) -> Attempt:
    attempt = Attempt(lambda: folder, 10)
    attempt.start(step)
    return attempt


def fail(attempt: Attempt, error: BaseException) -> None:
    with pytest.raises(type(error)), attempt:
        raise error


def status(folder: Path) -> RunStatus:
    found = read_status(folder)
    assert found is not None
    return found


def test_a_finished_run_has_one_attempt_that_is_not_repeated(tmp_path):
    with begin(tmp_path) as attempt:
        assert status(tmp_path).state == "running"
        attempt.saved(5)
        assert status(tmp_path).step == 5
        attempt.saved(10)
        attempt.end("finished", "Done.")
    found = status(tmp_path)
    assert (found.state, found.reason, found.step, found.steps, found.attempt) == ("finished", "Done.", 10, 10, 1)
    assert [(each["from_step"], each["to_step"], each["state"]) for each in found.attempts] == [(0, 10, "finished")]
    assert not should_requeue(found)[0]


@pytest.mark.parametrize(("state", "again"), [("preempted", True), ("stopped", False)])
def test_a_preempted_run_is_repeated_and_one_stopped_by_hand_is_not(tmp_path, state, again):
    with begin(tmp_path) as attempt:
        attempt.saved(3)
        attempt.end(state, "Asked to.")
    assert should_requeue(status(tmp_path))[0] is again


@pytest.mark.parametrize(
    ("error", "state", "again"),
    [
        (ValueError("no such flag"), "failed", False),
        (RunError("the disk is full"), "failed", True),
        (RuntimeError("anything"), "failed", True),
        (SystemExit(143), "preempted", True),
        (KeyboardInterrupt(), "stopped", False),
    ],
)
def test_an_error_is_recorded(tmp_path, error, state, again):
    attempt = begin(tmp_path)
    attempt.saved(3)
    fail(attempt, error)
    found = status(tmp_path)
    assert found.state == state and should_requeue(found)[0] is again
    assert state != "failed" or found.reason == str(error)


def test_a_killed_attempt_is_recorded_by_the_next(tmp_path):
    begin(tmp_path).saved(3)
    assert should_requeue(status(tmp_path))[0]
    begin(tmp_path, step=3)
    first, second = status(tmp_path).attempts
    assert (first["state"], first["reason"], first["to_step"]) == ("failed", KILLED, 3)
    assert (second["attempt"], second["state"], second["from_step"]) == (2, "running", 3)


def test_three_attempts_without_a_saved_step_are_the_last(tmp_path):
    for count in range(1, 4):
        fail(begin(tmp_path, step=4), RunError("lost"))
        assert should_requeue(status(tmp_path))[0] is (count < 3)
    begin(tmp_path, step=4).saved(5)
    assert should_requeue(status(tmp_path))[0]


def test_a_mistake_before_the_start_leaves_a_new_folder_empty_and_ends_the_repetition_of_an_old_run(tmp_path):
    fail(Attempt(lambda: tmp_path, 10), ValueError("wrong"))
    assert not list(tmp_path.iterdir())
    with begin(tmp_path) as attempt:
        attempt.saved(3)
        attempt.end("preempted", "Asked to.")
    fail(Attempt(lambda: tmp_path, 10), ValueError("wrong"))
    found = status(tmp_path)
    assert (found.state, found.reason, found.step, found.attempt) == ("failed", "wrong", 3, 2)
    assert not should_requeue(found)[0]


def test_a_finished_run_stays_finished_after_a_mistake(tmp_path):
    with begin(tmp_path) as attempt:
        attempt.end("finished", "Done.")
    fail(Attempt(lambda: tmp_path, 10), ValueError("wrong"))
    assert status(tmp_path).state == "finished"


LOST = LostProcessError(f"{LOST_CONNECTION} of the 2 processes")


CAUSES = {
    "an error": (RunError("the data worker died"), LOST, "failed", "the data worker died"),
    "a warning": (SystemExit(138), LOST, "preempted", "SIGUSR1 ended the run at once."),
    "a preemption": (SystemExit(143), LOST, "preempted", "SIGTERM ended the run at once."),
    "an error, and a launcher that ends the rest": (RunError("lost"), SystemExit(143), "failed", "lost"),
}
"""Errors of rank 1, which has the cause, and of rank 0, and the state and reason that must be recorded."""


@pytest.mark.parametrize("cause_is_first", [True, False])
@pytest.mark.parametrize(("cause", "effect", "state", "reason"), list(CAUSES.values()), ids=list(CAUSES))
def test_the_rank_that_caused_the_end_has_the_word(tmp_path, cause, effect, state, reason, cause_is_first):
    first = begin(tmp_path)
    first.saved(3)
    other = Attempt(lambda: tmp_path, 10, number=first.number)
    ends = [(other, cause), (first, effect)]
    for attempt, error in ends if cause_is_first else ends[::-1]:
        fail(attempt, error)
    found = status(tmp_path)
    assert (found.state, found.reason, found.step) == (state, reason, 3)
    assert found.attempts[0]["to_step"] == 3 and should_requeue(found)[0]


def test_a_rank_that_died_is_named_where_the_launcher_has_ended_the_rest(tmp_path):
    fail(begin(tmp_path), SystemExit(143))
    record_end(tmp_path, 1, "failed", "rank 1 ended without a message")
    assert (status(tmp_path).state, status(tmp_path).reason) == ("failed", "rank 1 ended without a message")
    fail(begin(tmp_path), SystemExit(138))
    record_end(tmp_path, 2, "failed", "rank 1 ended without a message")
    assert (status(tmp_path).state, status(tmp_path).attempt) == ("preempted", 2)


@pytest.mark.parametrize(("error", "again"), [(ValueError("no such key"), False), (OSError("no space"), True)])
def test_another_rank_says_whether_a_start_is_worthwhile(tmp_path, error, again):
    first = begin(tmp_path)
    fail(Attempt(lambda: tmp_path, 10, number=first.number), error)
    fail(first, LOST)
    found = status(tmp_path)
    assert found.reason == str(error) and should_requeue(found)[0] is again


@pytest.mark.parametrize("state", ["finished", "preempted", "stopped"])
def test_a_rank_that_fails_after_the_end_changes_nothing(tmp_path, state):
    with begin(tmp_path) as first:
        first.end(state, "Done.")
    before = (tmp_path / STATUS).read_bytes()
    fail(Attempt(lambda: tmp_path, 10, number=first.number), RunError("late"))
    assert (tmp_path / STATUS).read_bytes() == before


def test_nothing_is_written_to_a_folder_that_another_attempt_holds(tmp_path, caplog):
    old = begin(tmp_path)
    begin(tmp_path)
    before = (tmp_path / STATUS).read_bytes()
    fail(old, RunError("late"))
    fail(Attempt(lambda: tmp_path, 10, number=1), RunError("late"))
    assert (tmp_path / STATUS).read_bytes() == before

    def gone() -> Path:
        raise RunError("was taken over")

    old._place = gone
    fail(old, RunError("late"))
    assert "was taken over" in caplog.text and (tmp_path / STATUS).read_bytes() == before


def test_a_damaged_status_is_named_and_written_afresh(tmp_path, caplog):
    (tmp_path / STATUS).write_text('{"state": "run')
    begin(tmp_path)
    assert STATUS in caplog.text and json.loads((tmp_path / STATUS).read_text())["attempt"] == 1
