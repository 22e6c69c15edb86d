"""Benchmarks; see README.md. A package, so that none of the same name elsewhere is found."""
