"""From a dataset to batches of levels: where images come from, splits, what is held out, decoding, labels.

It knows nothing of models.
"""
