"""What all tests need before torch is imported."""

import xlstm_lm  # noqa: F401  bounds how long OpenMP's threads spin
