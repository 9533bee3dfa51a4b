"""The selective scan of Mamba-1: one contract, its recurrence, and the implementation that runs."""
