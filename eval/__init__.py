"""Studies and benchmarks, each `python -m eval.NAME`."""
