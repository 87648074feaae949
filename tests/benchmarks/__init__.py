"""Benchmarks; `python -m tests.benchmarks.throughput` runs the one of throughput."""
