"""The methods by their names: ``bound``, ``ode`` and ``importance_weighted``."""

from __future__ import annotations

import torch

from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.errors import ConfigurationError, shortened, unknown_name
from vdm_hub.fields import MAX_SEED, whole_number
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.hierarchical import hierarchical_measurement
from vdm_hub.likelihood.importance_weighted import ChainsMeasurement, WeightedFlowMeasurement
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.probability_flow import FlowMeasurement
from vdm_hub.likelihood.protocol import METHODS, ProbabilityFlow
from vdm_hub.objectives.hierarchical import HierarchicalObjective
from vdm_hub.objectives.variational_bound import Objective, VDMObjective


def build_measurement(
    objective: Objective,
    num_images: int,
    method: str = "bound",
    *,
    flow: ProbabilityFlow | None = None,
    draws: int = 16,
    seed: int = 0,
    times_per_image: int = 1,
    pilot_evaluations: int | None = None,
) -> Measurement:
    """A method on a model.

    Args:
        objective: The model: a `VDMObjective` with its number of transitions, or a hierarchical VAE's.
        num_images: How many images are to be measured: times are stratified over them.
        method: ``bound``, the variational bound; ``ode``, the probability-flow likelihood, in continuous time;
            ``importance_weighted``, over whole chains where there is a number of transitions, else over dequantised
            draws of the probability flow.
        flow: The protocol of a probability flow.
        draws: K, of ``importance_weighted``.
        seed: Of all draws.
        times_per_image: Of ``bound``: evaluations of each image in each replicate, at stratified times.
        pilot_evaluations: Of ``bound``: see `BoundEstimator`.

    Raises:
        ConfigurationError: The name is unknown, the model has no such likelihood, or its schedule no finite endpoints.
    """
    if method not in METHODS:
        raise unknown_name("likelihood method", method, METHODS)
    for name, value, least in (("draws", draws, 1), ("seed", seed, 0), ("times_per_image", times_per_image, 1)):
        whole_number(name, value, least, MAX_SEED)
    if flow is not None and not isinstance(flow, ProbabilityFlow):
        raise ConfigurationError(f"flow is {shortened(flow)}: give a ProbabilityFlow, such as ProbabilityFlow().")
    has_times = method == "bound" and not isinstance(objective, HierarchicalObjective)
    if not has_times and (times_per_image != 1 or pilot_evaluations is not None):
        raise ConfigurationError(
            f"times_per_image is {times_per_image} and pilot_evaluations {pilot_evaluations}, and only the bound of a "
            f"diffusion has times to draw: leave them out."
        )
    if isinstance(objective, HierarchicalObjective):
        return hierarchical_measurement(objective, method, draws, seed)
    if not isinstance(objective, VDMObjective):
        raise ConfigurationError(f"{type(objective).__name__} is no objective whose likelihood is known.")
    check_endpoints(objective.process)
    if method == "bound":
        return BoundEstimator(
            objective, num_images, seed, times_per_image=times_per_image, pilot_evaluations=pilot_evaluations
        )
    if method == "importance_weighted" and objective.transitions is not None:
        return ChainsMeasurement(objective, draws, seed)
    if objective.transitions is not None:
        raise ConfigurationError(
            f"transitions is {objective.transitions}, and the probability-flow ODE has none: leave it out, or ask for "
            f"method 'bound' or 'importance_weighted'."
        )
    if method == "ode":
        return FlowMeasurement(objective, flow, seed)
    return WeightedFlowMeasurement(objective, flow, draws, seed)


def check_endpoints(process: ForwardProcess) -> None:
    """Refuse a schedule whose ends have no finite log-SNR: its prior or reconstruction term would have no value.

    Raises:
        ConfigurationError: gamma(0) or gamma(1) is not finite.
    """
    schedule = process.diffused.scalar_gamma
    if schedule is None:
        return
    device = next((parameter.device for parameter in process.parameters()), torch.device("cpu"))
    with torch.no_grad():
        ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)).tolist()
    for time, gamma in zip((0, 1), ends, strict=True):
        if not abs(gamma) < float("inf"):
            raise ConfigurationError(
                f"{type(schedule).__name__} has gamma({time}) = {gamma}, and a bound needs finite endpoints: "
                f"cut the schedule in t where it passes, say, gamma = -13.3 and 5."
            )
