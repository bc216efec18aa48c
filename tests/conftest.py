"""Set up what all tests need before torch is imported."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xlstm_lm  # noqa: F401  bounds how long OpenMP's threads spin
from xlstm_lm.base.node_folder import node_local_folder

# The xlstm package, an oracle. `make` keeps it off the path of programs, where transformers would call its kernels.
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "oracles"))


@pytest.fixture
def fresh_choices():
    """Forget choices among backends before and after a test: no other test sees its stand-ins."""
    from xlstm_lm.ops.operation import forget

    forget()
    yield
    forget()


@pytest.fixture
def node_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The node's folder for caches, not there yet, in a temporary directory of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    node_local_folder.cache_clear()
    yield tmp_path / f"xlstm_lm-{os.getuid()}"
    node_local_folder.cache_clear()


@pytest.fixture(autouse=True)
def exact_denormals():
    """Let each test begin with denormal numbers as IEEE has them: training in this process flushes them to zero."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)
