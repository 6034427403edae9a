"""The forms that a model's bound has: one expectation, other terms, and estimators of other variance."""

from __future__ import annotations

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.objectives.consistency import ConsistencyObjective
from vdm_hub.objectives.hierarchical import HierarchicalObjective, HVAEObjective, JointHVAEObjective
from vdm_hub.objectives.restrictions import DenoisingHVAEObjective, has_linear_encoders
from vdm_hub.objectives.variational_bound import Objective, VDMObjective

_DRAWS = 108  # a stream of draws


def decompositions(objective: Objective) -> dict[str, Objective]:
    """The forms of a model's bound, by name; all have the same expectation.

    A VDM has ``denoising_matching`` (Luo eq. 58) and, with a number of transitions, ``consistency`` (Luo eq. 44). A
    hierarchical VAE has ``consistency`` and ``joint``, in which nothing is in closed form, and ``denoising_matching``
    only where its encoders are linear Gaussians, as those of a VDM are.

    >>> from vdm_hub import HVAEObjective, MarkovianHVAE
    >>> list(decompositions(HVAEObjective(MarkovianHVAE(8, in_channels=1, latent_shapes=[(4,)]))))
    ['consistency', 'joint']
    """
    if isinstance(objective, HierarchicalObjective):
        model = objective.model
        forms: dict[str, Objective] = {"consistency": HVAEObjective(model), "joint": JointHVAEObjective(model)}
        return {"denoising_matching": DenoisingHVAEObjective(model)} | forms if has_linear_encoders(model) else forms
    if not isinstance(objective, VDMObjective):
        raise ConfigurationError(f"{type(objective).__name__} is no objective whose forms are known.")
    parts = objective.network, objective.process, objective.transitions
    known: dict[str, Objective] = {"denoising_matching": VDMObjective(*parts)}
    return known if objective.transitions is None else known | {"consistency": ConsistencyObjective(*parts)}


def form_of(objective: Objective, name: str | None) -> Objective:
    """A model's bound in one of its forms; the objective itself where no form is asked for.

    Raises:
        ConfigurationError: The model's bound has no such form.
    """
    if name is None:
        return objective
    known = decompositions(objective)
    if name == "consistency" and name not in known:
        raise ConfigurationError(
            "the consistency form is a sum over transitions, and continuous time has none: give a number of them."
        )
    if name == "denoising_matching" and name not in known:
        raise ConfigurationError(
            f"the denoising-matching form needs q(z_(t-1)|z_t, x), which learned encoders do not have: this model has "
            f"{' and '.join(known)}."
        )
    if name not in known:
        raise unknown_name("decomposition", name, list(known))
    return known[name]
