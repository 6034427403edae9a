"""Rectified flow and EDM as targets of vdm_hub, with the inputs and noise levels that their networks read."""

from vdm_hub_flow.conditionings import EDMNoise, FlowTime
from vdm_hub_flow.targets import EDMPrediction, FlowPrediction

__all__ = ["EDMNoise", "EDMPrediction", "FlowPrediction", "FlowTime"]
