"""Allocation of schemes to blocks: time model, exact weighted-sum solver, frontier, files."""
