"""Floor 4, publication: a pipeline on the Hugging Face Hub, for readers with and without vdm_hub."""
