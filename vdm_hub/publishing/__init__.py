"""A pipeline on the Hugging Face Hub, for readers with and without vdm_hub: card, twin, carried code, commit."""
