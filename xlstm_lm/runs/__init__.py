"""A run's folder: its checkpoints, its records, and the rules for opening it."""
