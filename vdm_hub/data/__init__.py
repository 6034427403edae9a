"""Images as levels: loading, checking, batching. It knows nothing of models."""
