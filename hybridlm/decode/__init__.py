"""Text one token after another; the model is an argument."""
