"""Measure pastes and mask losses on a network that others trained."""
