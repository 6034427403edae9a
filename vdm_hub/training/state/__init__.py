"""What a run is at a moment, and how that is saved: its state, checkpoints, history, losses and output folder."""
