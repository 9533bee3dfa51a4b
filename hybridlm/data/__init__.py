"""Documents in, packed batches out: sources, tokenizers, packing and the pipeline."""
