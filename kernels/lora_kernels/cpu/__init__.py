"""Operators in C for the CPU at hand, compiled on first use: `docs/kernels.md` says how and why."""
