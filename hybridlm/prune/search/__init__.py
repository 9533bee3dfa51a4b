"""Search as pure functions: losses of masked models, a programme, evolution, halving, fronts."""
