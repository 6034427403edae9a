"""`VDMScheduler`, whose config is the whole truth of a process; diffusers' schedulers and checkpoints as such."""
