"""The Mamba-2 state-space scan: one contract, several implementations, chosen in `api`."""
