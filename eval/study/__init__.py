"""How a study runs: its file, its jobs, the journal of a measurement, its results and pictures."""
