"""Array operations: state-space scan, causal convolution, attention and norms."""
