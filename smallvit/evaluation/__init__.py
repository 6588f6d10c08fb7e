"""Evaluate trained models: predictions, metrics, intervals, tests and probes."""
