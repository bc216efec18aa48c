from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from xlstm_lm.base.program import warning_held_back
from xlstm_lm.training import stop_request as module
from xlstm_lm.training.stop_request import StopRequest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@contextlib.contextmanager
def at_work():
    """The handler in a run that has made a step."""
    with StopRequest() as request:
        request.handle_all()
        request.note_only()
        yield request


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_before_a_step_is_made_signals_end_the_run_at_once(number):
    with StopRequest() as request:
        request.handle_all()
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert number == signal.SIGINT or ended.value.code == 128 + number


def test_a_warning_that_comes_early_waits_for_the_handler_and_for_the_monitor():
    with warning_held_back():
        # Would otherwise end this process. Not to the whole process, in which earlier tests have left threads.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with StopRequest() as request:
            assert request.received == signal.SIGUSR1
            with pytest.raises(SystemExit) as ended:
                request.handle_all()
            assert ended.value.code == 138
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_signals_are_requests(number):
    before = signal.getsignal(number)
    with at_work() as request:
        assert request.reason == ""
        os.kill(os.getpid(), number)
        assert request.reason == f"{signal.Signals(number).name} was received."
        assert request.is_by_hand is (number == signal.SIGINT)
    assert signal.getsignal(number) is before


def test_a_scheduler_may_repeat_its_warning(clock):
    with StopRequest() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            clock.now += 10
        assert request.received == signal.SIGUSR1


def test_the_time_limit_leaves_room_for_two_steps_and_the_save(clock):
    request = StopRequest(max_hours=1.0)
    for seconds in (500, 20, 30, 20):  # the first step compiles
        request.step_begins()
        clock.now += seconds
    request.step_begins()
    request.saved(40)
    clock.now = 1000 + 3600 - 1.5 * 40 - 2 * 30 - 1
    assert request.reason == ""
    clock.now += 2
    assert request.reason == "training.max_hours (1) is nearly over." and not request.is_by_hand


def test_before_the_first_save_a_tenth_of_the_time_is_kept_for_it(clock):
    request = StopRequest(max_hours=0.5)
    clock.now += 0.9 * 1800 - 1
    assert request.reason == ""
    clock.now += 2
    assert "max_hours" in request.reason


def test_without_a_limit_a_session_may_last(clock):
    request = StopRequest()
    clock.now += 1e9
    assert request.reason == ""
