"""Training: the loop, and around it the dry run, memory, signals, trackers and publication."""
