"""Benchmarks: `pytest bench`, then `python -m bench.report`; `python -m bench.gpu` for a few minutes of GPU."""
