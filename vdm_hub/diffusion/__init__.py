"""The mathematics: forward processes, noise schedules, targets, reverse steps, samplers, decoders, times.

It imports only torch.
"""
