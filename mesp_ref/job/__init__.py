"""A run: its directory, its state, resuming, evaluation, limits, curves."""
