"""Training: the loop, what a run is made of, and what it keeps."""
