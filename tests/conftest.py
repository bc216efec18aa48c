"""Set up what all tests need before torch is imported."""

import sys
from pathlib import Path

import pytest

import xlstm_lm  # noqa: F401  bounds how long OpenMP's threads spin

# The xlstm package, an oracle. `make` keeps it off the path of programs, where transformers would call its kernels.
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "oracles"))


@pytest.fixture
def fresh_choices():
    """Forget choices among backends before and after a test: no other test sees its stand-ins."""
    from xlstm_lm.ops.operation import forget

    forget()
    yield
    forget()


@pytest.fixture(autouse=True)
def exact_denormals():
    """Let each test begin with denormal numbers as IEEE has them: training in this process flushes them to zero."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)
