"""Masked and uniform diffusion of tokens: processes, and likelihoods of masked models, for data of any K values."""

from vdm_hub_tokens.methods import ExactOrder, MaskedCounts, WeightedOrders
from vdm_hub_tokens.orders import RULES, OpeningRule
from vdm_hub_tokens.processes import AbsorbingProcess, TokenProcess, UniformProcess
from vdm_hub_tokens.schedules import SCHEDULES, SignalSchedule, build_schedule

__all__ = [
    "RULES",
    "SCHEDULES",
    "AbsorbingProcess",
    "ExactOrder",
    "MaskedCounts",
    "OpeningRule",
    "SignalSchedule",
    "TokenProcess",
    "UniformProcess",
    "WeightedOrders",
    "build_schedule",
]
