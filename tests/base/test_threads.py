"""OpenMP's threads spin for a bounded time, unless the user has chosen."""

from __future__ import annotations

import os

import pytest

from xlstm_lm.base.threads import BOUNDED_SPIN, USERS_CHOICES, bound_spinning


@pytest.fixture
def environment(monkeypatch):
    for name in USERS_CHOICES:
        monkeypatch.setenv(name, "")  # the fixture puts it back
        monkeypatch.delenv(name)


def test_the_spin_is_bounded_in_both_libraries(environment):
    bound_spinning()
    assert {name: os.environ[name] for name in BOUNDED_SPIN} == {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", USERS_CHOICES)
def test_a_choice_of_the_users_stands(environment, monkeypatch, name):
    monkeypatch.setenv(name, "active")
    bound_spinning()
    assert [each for each in USERS_CHOICES if each in os.environ] == [name]


def test_it_is_set_before_torch_is_imported():
    import subprocess
    import sys

    code = "import sys, os, xlstm_lm; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    bare = {name: value for name, value in os.environ.items() if name not in USERS_CHOICES}
    assert subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True).stdout == "10000\n"
