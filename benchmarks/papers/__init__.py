"""The papers' claims, run again small: `python -m benchmarks.papers`."""
