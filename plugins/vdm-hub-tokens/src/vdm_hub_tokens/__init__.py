"""Masked and uniform diffusion of tokens: forward processes of vdm_hub for data of any number of values."""

from vdm_hub_tokens.processes import AbsorbingProcess, TokenProcess, UniformProcess
from vdm_hub_tokens.schedules import SCHEDULES, SignalSchedule, build_schedule

__all__ = [
    "SCHEDULES",
    "AbsorbingProcess",
    "SignalSchedule",
    "TokenProcess",
    "UniformProcess",
    "build_schedule",
]
