"""The likelihood methods as objects: what each measures, and all that may be chosen of it.

A method is a frozen dataclass, registered under a name in the registry's kind ``likelihood_methods``. A new one is one
class and one entry point: the command line, the report and the model card ask the object. Nothing heavy is imported
until a method is put on a model, so that a command line is answered at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.fields import MAX_SEED, check_fields, option, whole_number
from vdm_hub.likelihood.protocol import FORMS, FlowSettings

if TYPE_CHECKING:
    from vdm_hub.likelihood.measurement import Measurement
    from vdm_hub.objectives.variational_bound import Objective, VDMObjective

KIND = "likelihood_methods"
_MOST_TRANSITIONS = 10**7


class LikelihoodMethod(ABC):
    """A way to measure a likelihood. A subclass is a frozen dataclass whose fields are `vdm_hub.fields.option`.

    Attributes:
        name: Under which it is registered, and which reports and cards give.
        transitions: T of the model that is measured; ``None`` for continuous time, and where there are none.
        example_fields: A `VDMScheduler`'s config fields of a process that the conformance kit may measure by it.

    Example:
        >>> from vdm_hub import ImportanceWeighted
        >>> method = ImportanceWeighted(draws=64, transitions=10)
        >>> method.name, method.chosen()
        ('importance_weighted', {'transitions': 10, 'draws': 64})
    """

    name: ClassVar[str]
    transitions: int | None = None
    example_fields: ClassVar[Mapping[str, Any]] = {
        "forward_process": "gaussian",
        "num_levels": 17,
        "num_train_timesteps": 1000,
    }

    @abstractmethod
    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """The measurement by this method on a model.

        Args:
            objective: The model, with this method's `transitions`.
            num_images: How many images are to be measured, all batches together.
            seed: Of all draws.

        Raises:
            ConfigurationError: The model has no such likelihood.
        """

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """The options by name: the dataclass's fields, those of a nested `ProbabilityFlow` beside them."""
        return {one.name: one for one in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> LikelihoodMethod:
        """The method with some of its `options`.

        Raises:
            ConfigurationError: One is none of this method's, or its value is out of range.
        """
        cls._refuse_others(given)
        return cls(**given)

    @classmethod
    def _refuse_others(cls, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if name not in cls.options():
                raise ConfigurationError(
                    f"{name} is {shortened(value)}, and the method {cls.name!r} has no such option; it has "
                    f"{', '.join(cls.options()) or 'none'}: leave it out, or choose another method."
                )

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name, as plain JSON: what `from_options` takes."""
        return {
            name: getattr(self, name) for name, one in self.options().items() if getattr(self, name) != one.default
        }

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class VariationalBound(LikelihoodMethod):
    """The variational lower bound on ``log p(x)``: VDM eq. 11, estimated as `vdm_hub.BoundEstimator` does.

    Attributes:
        transitions: T, the number of transitions (VDM eq. 13); ``None`` for continuous time (VDM eq. 17).
        times_per_datum: Evaluations of each image in each replicate, at stratified times.
        pilot_evaluations: Draws, in no result, from which it learns where times are best drawn and what may be
            subtracted; 0 for none. As many as images, from 256 to 4,096, where not given.
        decomposition: The form of the bound, where the model's has several, of one expectation and other variance:
            ``denoising_matching``, ``consistency`` or ``joint``; see `vdm_hub.decompositions`. Its own, which it
            trains on, where not given.

    Raises:
        ConfigurationError: A number is out of range, or the form unknown.

    >>> VariationalBound(transitions=1000).chosen()
    {'transitions': 1000}
    """

    name = "bound"

    transitions: int | None = option(
        None, "T, the number of transitions; without it, continuous time", at_least=1, at_most=_MOST_TRANSITIONS
    )
    times_per_datum: int = option(
        1,
        "evaluations of each image in each replicate, at stratified times",
        at_least=1,
        at_most=10**6,
    )
    pilot_evaluations: int | None = option(
        None,
        "draws, in no figure, that say where times are best drawn; 0 for none; without it, as many as images, from "
        "256 to 4,096",
        at_least=0,
        at_most=10**9,
    )
    decomposition: str | None = option(
        None,
        f"the form of the bound, where the model's has several, of one expectation and other variance: "
        f"{', '.join(FORMS)}",
        choices=FORMS,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """A `vdm_hub.BoundEstimator` on a diffusion; one draw of all latents on a hierarchy of them."""
        from vdm_hub.likelihood.estimator import BoundEstimator
        from vdm_hub.likelihood.hierarchical import HierarchicalMeasurement
        from vdm_hub.objectives.decompositions import form_of
        from vdm_hub.objectives.hierarchical import HierarchicalObjective

        objective = form_of(objective, self.decomposition)
        if isinstance(objective, HierarchicalObjective):
            self._refuse_times()
            return HierarchicalMeasurement(objective, seed)
        return BoundEstimator(
            _diffusion(objective, self),
            num_images,
            seed,
            times_per_datum=self.times_per_datum,
            pilot_evaluations=self.pilot_evaluations,
        )

    def _refuse_times(self) -> None:
        if self.times_per_datum != 1 or self.pilot_evaluations is not None:
            raise ConfigurationError(
                f"times_per_datum is {self.times_per_datum} and pilot_evaluations {self.pilot_evaluations}, and a "
                f"hierarchy of latents has no times to draw: leave them out."
            )


@dataclass(frozen=True)
class ProbabilityFlow(FlowSettings, LikelihoodMethod):
    """The likelihood of the probability-flow ODE (Song et al., arXiv 2011.13456, eq. 39), in continuous time.

    Another model than the bound's: see `vdm_hub.FlowMeasurement`. A report carries all of its fields.

    Attributes:
        dequantization: ``truncated_normal`` or ``uniform``: see `vdm_hub.likelihood.dequantization`.
        divergence: ``rademacher`` or ``gaussian`` probes (Hutchinson: ``E v' J v = tr J``, unbiased), or ``exact``,
            which costs one backward pass per dimension.
        probes: How many probes are averaged, each one more backward pass.
        tolerance: Of a step's error, absolute and relative: of z as the root mean square over dimensions, and of the
            log-density in nats per dimension, the two added in squares.
        max_steps: Steps that one datum may take.
        solver: ``rk45`` or ``dop853``, adaptive methods of Dormand and Prince, of order 5(4) and 8(5, 3), by scipy.
            The second is for smooth fields: with Fourier features of the input it takes more evaluations.
        dtype: What the network computes in: ``float64``, or ``float32``, for its own precision. In float32 rounding,
            amplified by the solver, is an error beside the tolerance's, and figures depend on the batch size by it.

    Raises:
        ConfigurationError: A name is unknown or a number out of range.

    >>> flow = ProbabilityFlow(divergence="exact")
    >>> flow.dequantization, flow.tolerance, flow.solver
    ('truncated_normal', 1e-05, 'rk45')
    """

    name = "ode"

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """A `vdm_hub.FlowMeasurement`."""
        from vdm_hub.likelihood.probability_flow import FlowMeasurement

        return FlowMeasurement(_diffusion(objective, self), self, seed)


@dataclass(frozen=True)
class ImportanceWeighted(LikelihoodMethod):
    """An importance-weighted bound (Burda et al., arXiv 1509.00519, eq. 8): ``E log 1/K sum_k w_k``.

    Over whole chains, where there is a number of transitions, or over the latents of a hierarchy; else over
    dequantised draws of the probability flow.

    Attributes:
        transitions: T, the number of transitions; ``None`` for continuous time, and for a hierarchy.
        draws: K. It takes K times T, or K times an ODE's, evaluations of each image.
        flow: How each ODE is solved, in continuous time.

    Raises:
        ConfigurationError: A number is out of range, or a flow given where there are transitions.

    >>> ImportanceWeighted(draws=4, flow=ProbabilityFlow(divergence="exact")).chosen()
    {'draws': 4, 'divergence': 'exact'}
    """

    name = "importance_weighted"

    transitions: int | None = option(
        None,
        "T, the number of transitions; without it, continuous time",
        at_least=1,
        at_most=_MOST_TRANSITIONS,
    )
    draws: int = option(16, "K, draws an image", at_least=1, at_most=10**6)
    flow: ProbabilityFlow | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.flow, Mapping):  # as a config has it
            object.__setattr__(self, "flow", ProbabilityFlow.from_options(self.flow))
        if self.flow == ProbabilityFlow():  # what is taken where none is given
            object.__setattr__(self, "flow", None)
        if self.flow is not None and not isinstance(self.flow, ProbabilityFlow):
            raise ConfigurationError(
                f"flow is {shortened(self.flow)}: give a ProbabilityFlow, such as ProbabilityFlow()."
            )
        if self.flow is not None and self.transitions is not None:
            raise ConfigurationError(
                f"transitions is {self.transitions} and flow {self.flow.chosen() or 'given'}: weights are over chains "
                f"of transitions or over draws of the flow, which has none; leave one of them out."
            )

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """The method's own options, and those of the flow."""
        return {name: one for name, one in super().options().items() if name != "flow"} | ProbabilityFlow.options()

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> ImportanceWeighted:
        """The method with options: see `LikelihoodMethod.from_options`."""
        cls._refuse_others(given)
        flow = {name: value for name, value in given.items() if name in ProbabilityFlow.options()}
        own = {name: value for name, value in given.items() if name not in flow}
        return cls(**own, flow=ProbabilityFlow(**flow) if flow else None)

    def chosen(self) -> dict[str, Any]:
        """The options that were chosen: see `LikelihoodMethod.chosen`."""
        own = {name: value for name in ("transitions", "draws") if (value := getattr(self, name)) is not None}
        own = {name: value for name, value in own.items() if value != self.options()[name].default}
        return own | (self.flow.chosen() if self.flow is not None else {})

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """A measurement by weights over latents, over chains, or over draws of the flow: what the model has."""
        from vdm_hub.likelihood.hierarchical import HierarchicalChains
        from vdm_hub.likelihood.importance_weighted import ChainsMeasurement, WeightedFlowMeasurement
        from vdm_hub.objectives.hierarchical import HierarchicalObjective

        if isinstance(objective, HierarchicalObjective):
            if self.flow is not None:
                raise ConfigurationError("a hierarchical VAE has no probability flow: leave its options out.")
            return HierarchicalChains(objective, self.draws, seed)
        if self.transitions is not None:
            return ChainsMeasurement(_diffusion(objective, self), self.draws, seed)
        return WeightedFlowMeasurement(_diffusion(objective, self), self.flow, self.draws, seed)


def _diffusion(objective: Objective, method: LikelihoodMethod) -> VDMObjective:
    """The objective itself, where it is a diffusion's; else an error.

    Raises:
        ConfigurationError: It is another.
    """
    from vdm_hub.objectives.variational_bound import VDMObjective

    if isinstance(objective, VDMObjective):
        return objective
    raise ConfigurationError(
        f"the model has no {method.name!r} likelihood, as {type(objective).__name__} is that of no diffusion: choose "
        f"another method, such as 'bound'."
    )


METHODS = (VariationalBound, ProbabilityFlow, ImportanceWeighted)
"""The methods that come with the package."""

Method: TypeAlias = LikelihoodMethod | registry.Serialised
"""A method, its name, or its serialised form."""


def method_of(method: Method) -> LikelihoodMethod:
    """The method of a name or a serialised form; a method stays itself.

    Raises:
        ConfigurationError: The name is unknown, or an option is none of the method's.
        MissingPluginError: It is of a package that is not installed.

    >>> method_of({"name": "bound", "config": {"transitions": 10}})
    VariationalBound(transitions=10, times_per_datum=1, pilot_evaluations=None, decomposition=None)
    """
    if isinstance(method, LikelihoodMethod):
        return method
    built: LikelihoodMethod = registry.build(KIND, method)
    return built


def build_measurement(objective: Objective, num_images: int, method: Method = "bound", seed: int = 0) -> Measurement:
    """The measurement by a method on a model.

    Args:
        objective: The model, with the method's number of transitions.
        num_images: How many images are to be measured, all batches together.
        method: The method, or its name.
        seed: Of all draws.

    Raises:
        ConfigurationError: The model has no such likelihood, or its schedule no finite endpoints.
    """
    from vdm_hub.objectives.variational_bound import Objective, check_finite_ends

    method = method_of(method)
    whole_number("seed", seed, 0, MAX_SEED)
    if not isinstance(objective, Objective):
        raise ConfigurationError(f"{type(objective).__name__} is no objective, so its likelihood is not known.")
    if (process := getattr(objective, "process", None)) is not None:
        check_finite_ends(process)
    if objective.transitions != method.transitions:
        raise ConfigurationError(
            f"transitions is {objective.transitions} of the objective, and {method.transitions} of the method "
            f"{method.name!r}: give both the same."
        )
    measurement = method.build(objective, num_images, seed)
    measurement.options = method.chosen()
    return measurement
