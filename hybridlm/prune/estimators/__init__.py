"""Estimators: folds of a batch's activations, weights or gradients that say what entries matter."""
