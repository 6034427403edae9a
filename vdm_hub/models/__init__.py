"""Networks: the U-Net of a VDM, hierarchical VAEs, first stages, and noise schedules with weights at inference."""
