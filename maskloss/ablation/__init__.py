"""Ablations: training runs that differ in one change, over several seeds, and statistics of their differences."""
