"""Distillation losses, from hidden states and heads; they know no model."""
