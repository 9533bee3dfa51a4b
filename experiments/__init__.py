"""Commands: where the model meets pruning and training. Each module runs with `python -m`."""
