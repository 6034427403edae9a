"""Noise schedules from the literature, as ``gamma(t) = -log SNR(t)`` between two endpoints."""

from vdm_hub_schedules.cut import CutSchedule
from vdm_hub_schedules.schedules import (
    EDMLogNormalSchedule,
    LaplaceSchedule,
    PolynomialSchedule,
    ShiftedCosineSchedule,
    SigmoidSchedule,
)

__all__ = [
    "CutSchedule",
    "EDMLogNormalSchedule",
    "LaplaceSchedule",
    "PolynomialSchedule",
    "ShiftedCosineSchedule",
    "SigmoidSchedule",
]
