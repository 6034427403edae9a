"""Learned forward processes, ``q(z_t|x) = N(alpha_t m(x, t), sigma_t^2 I)`` with m a network of the data."""

from vdm_hub_learned.encoders import ConvolutionalEncoder, Encoder
from vdm_hub_learned.process import BoundEncoded, EncodedProcess, LearnedProcess

__all__ = ["BoundEncoded", "ConvolutionalEncoder", "EncodedProcess", "Encoder", "LearnedProcess"]
