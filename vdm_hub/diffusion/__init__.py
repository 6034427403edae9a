"""The mathematics: forward processes, noise schedules, targets, decoders and times. It imports only torch."""
