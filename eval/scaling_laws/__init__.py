"""Scaling laws: ladders of runs, fits of their losses, forecasts, and comparisons at equal loss."""
