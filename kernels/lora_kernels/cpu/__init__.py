"""Operators in C for the CPU at hand, compiled on first use: `docs/kernels.md` tells how and why."""
