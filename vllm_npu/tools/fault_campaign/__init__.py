"""Ranks under faults that a seed draws, in one process and in simulated time."""
