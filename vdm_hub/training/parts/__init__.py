"""What a run is made of: processes, networks, first stages, optimiser, moving average, early stopping."""
