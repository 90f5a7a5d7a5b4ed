"""Allocation of schemes to blocks: exact weighted-sum solver, frontier, files. Times come from `timing`, as numbers."""
