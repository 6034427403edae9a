r"""diffusers' schedulers outside the DDPM family as the process of a VDM: flow matching, EDM and VE.

They differ in the latent that a network reads, in what it predicts, and in how it is told the noise, and all are the
VDM at the same signal-to-noise ratio (Kingma and Gao, arXiv 2303.00848, section 2). With ``s = sigma/alpha``:

    flow matching   reads (1 - u) x + u eps, u = s/(1 + s)      predicts eps - x      is told T u
    EDM             reads c_in (x + s eps)                      predicts F            is told ln(s)/4
    VE              reads x + s eps                             predicts -eps/s       is told s

Where the noise ends is the scheduler's own affair. Where K levels lie, and how they follow from the first latent, no
scheduler says: that is asked for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.fields import whole_number
from vdm_hub.registry import CARRIED_PROCESS, Serialised

_ASKED = {
    "num_levels": "how many levels the images have that it was trained on, such as 256",
    "data_scaling": "where they lie: 'full' from -1 to 1, 'unit' from 0 to 1, or 'bin_centers'",
    "decoder": "how levels follow from the first latent: 'factorised' (VDM eq. 6), or 'ddpm' (DDPM eq. 13)",
}


@dataclass(frozen=True)
class Family:
    """How the schedulers of one family are read.

    Args:
        name: The family's, in words.
        read: The fields of a `VDMScheduler` that follow from a scheduler's config.
        asked: The fields that do not, and must be given.
        own_loop: diffusers' pipeline whose loop its schedulers need, where the common one does not run them.
    """

    name: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    asked: tuple[str, ...] = tuple(_ASKED)
    own_loop: str | None = None

    def fields(self, source: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the `VDMScheduler`, those given among them.

        Raises:
            ConfigurationError: What the family leaves undefined was not given, or the config is none of its own.
        """
        given = {field: value for field, value in given.items() if value is not None}
        missing = [field for field in self.asked if field not in given]
        if missing:
            raise ConfigurationError(
                f"{source} is a model of the family {self.name}, which leaves undefined what a likelihood needs: give "
                f"{'; '.join(f'{field}, {_ASKED[field]}' for field in missing)}."
            )
        if "variance_type" in given:
            raise ConfigurationError(
                f"{source} is a model of the family {self.name}, and variance_type belongs to betas: leave it out."
            )
        config = _complete(config)
        if (target := given.pop("prediction_type", None)) is not None:
            config["prediction_type"] = target
        read = self.read(config)
        for field in read.keys() & given.keys():
            if read[field] != given[field]:
                raise ConfigurationError(
                    f"{source} is a model of the family {self.name}, whose {field} is {read[field]!r}, and "
                    f"{shortened(given[field])} was given: leave it out."
                )
        return read | given


def process_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `VDMScheduler`'s config in that of any scheduler of a `VDMPipeline`: its own, or one that it carries."""
    carried = config.get(CARRIED_PROCESS)
    return carried if isinstance(carried, Mapping) else config


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a stock scheduler's config; ``None`` for the DDPM family, ours, and what is not known.

    >>> family_of({"_class_name": "EDMEulerScheduler"}).name, family_of({"_class_name": "DDIMScheduler"})
    ('EDM', None)
    """
    if config.get("use_flow_sigmas"):
        return _FLOW
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return _EULER
    return _FAMILIES.get(str(config.get("_class_name", _by_fields(config))))


_DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler")
"""The schedulers of networks that were distilled to jump to the data: they estimate no mean of it."""


def check_knowable(source: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that is of no family: it has neither betas nor sigmas that anybody here can read.

    Raises:
        ConfigurationError: Naming its class, and those that are known.
    """
    name = config.get("_class_name")
    if name in _DISTILLED and config.get("noise_schedule") is None:
        raise ConfigurationError(
            f"the scheduler of {source} is a {name}, that of a distilled network, which jumps to the data and is no "
            f"denoiser of a diffusion: it has no likelihood. Measure the network that it was distilled from."
        )
    if "beta_schedule" not in config and "noise_schedule" not in config and family_of(config) is None:
        raise ConfigurationError(
            f"the scheduler of {source} is a {config.get('_class_name', 'scheduler')} without betas, and none of "
            f"{', '.join(_FAMILIES)}: which process its network was trained for can't be told. Build a VDMScheduler "
            f"with a noise_schedule, prediction_type and conditioning that match the network."
        )


def with_process(scheduler: Any, vdm: Any) -> Any:
    """A stock scheduler of the same config that carries a `VDMScheduler`'s, so that likelihoods are those of its VDM.

    Args:
        scheduler: Of diffusers; it stays as it is.
        vdm: The `VDMScheduler`.
    """
    carried = {key: value for key, value in vdm.config.items() if not key.startswith("_")}
    own = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    made = type(scheduler).from_config(own)
    made.register_to_config(**{CARRIED_PROCESS: carried})
    return made


def own_loop(scheduler: Any) -> type | None:
    """Diffusers' pipeline whose loop a stock scheduler needs, if it does.

    >>> from diffusers import DDIMScheduler, ScoreSdeVeScheduler
    >>> own_loop(ScoreSdeVeScheduler()).__name__, own_loop(DDIMScheduler())
    ('ScoreSdeVePipeline', None)
    """
    family = _FAMILIES.get(type(scheduler).__name__)
    return None if family is None or family.own_loop is None else getattr(diffusers, family.own_loop)


def ends_of_noise(config: Mapping[str, Any]) -> tuple[float, float]:
    """``(gamma_min, gamma_max)``, the log of the smallest and the largest squared ``s`` of a config with sigmas.

    Raises:
        ConfigurationError: They are no positive numbers in order.
    """
    least: Any = config.get("sigma_min")
    most: Any = config.get("sigma_max")
    if not all(isinstance(end, int | float) for end in (least, most)) or not 0 < least < most < math.inf:
        raise ConfigurationError(
            f"sigma_min and sigma_max of the scheduler are {shortened((least, most))}, which are no ends of the noise "
            f"that its network knows: give its config two positive numbers in order."
        )
    return 2 * math.log(least), 2 * math.log(most)


def _by_fields(config: Mapping[str, Any]) -> str | None:
    """The class of a config that was made in code, and does not say it, by the fields that it alone has."""
    fields = {key for key in config if not key.startswith("_")}
    for name in _FAMILIES:
        if fields == inspect.signature(getattr(diffusers, name)).parameters.keys():
            return name
    return None


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its class for what a file leaves out."""
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = {} if cls is None else inspect.signature(cls.__init__).parameters
    defaults = {key: one.default for key, one in parameters.items() if one.default is not one.empty}
    return defaults | dict(config)


def _check_target(config: Mapping[str, Any], family: str, target: str) -> None:
    """Refuse a target that is said, by a config or whoever corrects it, and is none of the family's."""
    said = config.get("prediction_type", target)
    if said != target:
        raise ConfigurationError(
            f"prediction_type is {shortened(said)}, and networks of {family} predict {target!r}: give that, or leave "
            f"it out where the config does not say it."
        )


def _linear(gamma_min: float, gamma_max: float) -> dict[str, Any]:
    # The bound in continuous time depends on the ends alone; sampling grids are the stock scheduler's.
    return {"name": "linear", "config": {"gamma_min": gamma_min, "gamma_max": gamma_max}}


def _read_flow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Times u = 1/T to 1 - 1/T: at 0 there is no noise, at 1 no data, and a network was shown T times in between."""
    if config.get("invert_sigmas"):
        raise ConfigurationError(
            "the scheduler has invert_sigmas=True, so that its network is told the share of the data: no conditioning "
            "that is known here falls with the noise. Build a VDMScheduler with one of your own."
        )
    _check_target(config, "flow matching", "flow_prediction")
    steps = whole_number("num_train_timesteps", config.get("num_train_timesteps", 1000), least=3)
    last = 2 * math.log(steps - 1)
    return {
        "noise_schedule": _linear(-last, last),
        "prediction_type": "flow_prediction",
        "conditioning": "flow_time",
        "num_train_timesteps": steps,
    }


def _read_edm(config: Mapping[str, Any]) -> dict[str, Any]:
    target = {key: config[key] for key in ("sigma_data", "prediction_type") if key in config}
    return _by_sigmas(config, {"name": "edm", "config": target}, "edm_noise")


def _by_sigmas(config: Mapping[str, Any], target: Serialised, conditioning: str) -> dict[str, Any]:
    schedule = _linear(*ends_of_noise(config))
    return {"noise_schedule": schedule, "prediction_type": target, "conditioning": conditioning}


def _read_euler(config: Mapping[str, Any]) -> dict[str, Any]:
    """EDM's noise levels of a VP velocity: ``c_in y = z`` and ``x = alpha z - sigma v`` for data of deviation 1."""
    _check_target(config, "Euler with continuous timesteps", "v_prediction")
    return _by_sigmas(config, "v_prediction", "edm_noise")


def _read_ve(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_target(config, "VE", "ve_score")
    return _by_sigmas(config, "ve_score", "ve_noise")


def _read_karras_ve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its pipeline samples from -1 to 1 and halves all for a VE network from 0 to 1: ``F((y + 1)/2, s/2)``."""
    gamma_min, gamma_max = (gamma - 2 * math.log(2) for gamma in ends_of_noise(config))
    return _read_ve(config) | {"noise_schedule": _linear(gamma_min, gamma_max), "data_scaling": "unit"}


_FLOW = Family("flow matching", _read_flow)
_EDM = Family("EDM", _read_edm)
_EULER = Family("Euler with continuous timesteps", _read_euler)
_FAMILIES = {
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "ScoreSdeVeScheduler": Family("VE", _read_ve, own_loop="ScoreSdeVePipeline"),
    "KarrasVeScheduler": Family(
        "VE by Karras", _read_karras_ve, ("num_levels", "decoder"), own_loop="KarrasVePipeline"
    ),
}
