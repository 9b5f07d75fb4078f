"""Ablations: the same training run with one thing changed, over several seeds, and what can be said of it."""
