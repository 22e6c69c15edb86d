"""The GPU script: `python -m benchmarks.gpu`."""
