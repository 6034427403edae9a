"""From a dataset to batches of levels: sources, decoding, loading. It knows nothing of models."""
