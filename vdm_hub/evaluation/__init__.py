"""The likelihood of a model over a whole dataset: several processes, and a journal that survives kills."""
