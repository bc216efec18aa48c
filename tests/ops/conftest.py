"""A process beside pytest in which Triton interprets its kernels.

The interpreter has to be switched on before the kernels are imported, and an access outside a tensor can corrupt its
process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from tests.ops.interpreter import switch_on


def _new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=switch_on)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """`interpreted(function, ...)` is what `function(...)` of the test module returns in such a process, shared by all
    tests. A call in which it dies fails; the next one has a new process."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'xlstm-lm[gpu]')")
    pool = _new_process()

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal pool
        try:
            return pool.submit(function, *arguments, **options).result()
        except BrokenProcessPool:
            pool = _new_process()
            raise

    yield call
    pool.shutdown()
