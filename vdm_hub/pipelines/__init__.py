"""The pipelines of the ladder: samples and likelihoods, saved and loaded; diffusers knows them once it is imported."""
