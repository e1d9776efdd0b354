"""Benchmarks: cases as data, peers as providers, results as JSON lines. `python -m benchmarks --help`."""
