"""Provide errors, atomic files, hardware, distributed, signals, plots and tables to every other package."""
