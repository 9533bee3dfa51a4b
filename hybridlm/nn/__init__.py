"""Flax modules of the hybrid model; every forward returns `(result, taps)`."""
