"""Lossless files from the bound of a model: see `encode` and `decode`."""

from vdm_hub_codec.codec import CodecReport, decode, encode

__all__ = ["CodecReport", "decode", "encode"]
