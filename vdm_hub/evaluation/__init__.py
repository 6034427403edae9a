"""The bound of a model over a whole dataset."""
