"""Set up what all tests need before torch is imported."""

import sys
from pathlib import Path

import xlstm_lm  # noqa: F401  bounds how long OpenMP's threads spin

# The xlstm package, an oracle. `make` keeps it off the path of programs, where transformers would call its kernels.
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "oracles"))
