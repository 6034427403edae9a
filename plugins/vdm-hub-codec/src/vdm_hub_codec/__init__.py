"""Lossless files from the bound of a model: see `encode` and `decode`."""

from vdm_hub_codec.blocks import Block, Coder
from vdm_hub_codec.chains import Chain
from vdm_hub_codec.codec import Decoded, decode, encode
from vdm_hub_codec.decisions import Decisions
from vdm_hub_codec.distributions import Choices, Normal
from vdm_hub_codec.report import CodecReport
from vdm_hub_codec.stack import Stack

__all__ = [
    "Block",
    "Chain",
    "Choices",
    "CodecReport",
    "Coder",
    "Decisions",
    "Decoded",
    "Normal",
    "Stack",
    "decode",
    "encode",
]
