"""Run grids of runs (compare, reproduce) and keep published numbers and records."""
