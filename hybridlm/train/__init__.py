"""The one training loop and its parts; it knows trees, names and loss functions, no model."""
