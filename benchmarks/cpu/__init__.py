"""The CPU script: `python -m benchmarks.cpu`."""
