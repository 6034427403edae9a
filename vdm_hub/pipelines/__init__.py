"""The pipelines of the ladder: samples and likelihoods, saved and loaded, and how diffusers comes to know them."""
