"""`VDMScheduler`, whose config is the whole truth of a process; diffusers' schedulers and checkpoints read as one."""
