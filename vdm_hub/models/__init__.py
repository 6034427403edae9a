"""Networks: the U-Net of a VDM, hierarchical VAEs, first stages, and what carries a registered class."""
