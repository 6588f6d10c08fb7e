"""Measure FLOPs, memory, latency and throughput."""
