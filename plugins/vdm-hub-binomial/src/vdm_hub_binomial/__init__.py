"""Binomial diffusion of bits, a forward process of vdm_hub without gamma, target or decoder."""

from vdm_hub_binomial.process import BinomialProcess, BoundBinomial

__all__ = ["BinomialProcess", "BoundBinomial"]
