"""A distribution of plugins that break one law each: ``BROKEN[kind][law]`` builds the one that breaks it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.commands.command import Command
from vdm_hub.diffusion.conditioning import AffineConditioning, Conditioning
from vdm_hub.diffusion.decoders import Decoder, FactorisedDecoder, Predict
from vdm_hub.diffusion.draws import image_generator, normal_noise
from vdm_hub.diffusion.forward_process import Network, Noise
from vdm_hub.diffusion.gaussian import alpha, broadcast, sigma
from vdm_hub.diffusion.gaussian_process import BoundGaussian, GaussianProcess
from vdm_hub.diffusion.learned_schedules import LearnedLinearSchedule
from vdm_hub.diffusion.noise_schedules import Gamma, LinearSchedule, NoiseSchedule
from vdm_hub.diffusion.parameterizations import Epsilon, Parameterization, Score
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.fields import check_fields, option
from vdm_hub.likelihood.measurement import Batches, Measured, Measurement
from vdm_hub.likelihood.methods import LikelihoodMethod
from vdm_hub.objectives.variational_bound import Batch, Objective

# ---- noise schedules ------------------------------------------------------------------------------------------------


class Linear(LinearSchedule):
    """Keeps every law: what is broken below is broken by what is added to it."""

    def to_config(self) -> dict[str, Any]:
        return {"gamma_min": self.gamma_min, "gamma_max": self.gamma_max}


class SaysItHasAGammaPerPixel(Linear):
    scalar = False


class InfiniteAtTheEnd(Linear):
    def forward(self, t: Tensor) -> Tensor:
        return torch.where(t == 1, torch.inf, super().forward(t))


class WithAPlateau(Linear):
    scalar = False

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t.clamp(min=0.5)).reshape(-1, 1, 1, 1)


class DetachedTime(Linear):
    def forward(self, t: Tensor) -> Tensor:
        return super().forward(0.5 * t + 0.5 * t.detach())


class UnusedParameter(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(()))

    def to_config(self) -> dict[str, Any]:
        return {}


class VarianceMovesTheEndpoints(LearnedLinearSchedule):
    def variance_parameters(self) -> set[str]:
        return {"gamma_min"}


class EndpointsTheOtherWayRound(Linear):
    def endpoints(self) -> tuple[float, float]:
        first, last = super().endpoints()
        return last, first


class InverseWithoutAnEnd(Linear):
    def inverse(self, gamma: Tensor) -> Tensor:
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)


class PublishesItsInitialValues(LearnedLinearSchedule):
    def bake(self) -> NoiseSchedule:
        return LinearSchedule(**self.to_config())


class ForgetsAnArgument(Linear):
    def to_config(self) -> dict[str, Any]:
        return {"gamma_min": self.gamma_min}


class ExtraTermWithATakenName(Linear):
    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], Gamma]:
        return ({} if x is None else {"prior": torch.zeros(len(x))}), self


class Bent(Linear):
    """A gamma per datum, bent by its own number in (-1, 1)."""

    scalar = False

    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return {"bend": normal_noise((batch_size, 1, 1, 1), generator, device)}

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        bend = torch.tanh(self.bend(x, noise))
        return {}, lambda t: self.bent(t.reshape(-1, 1, 1, 1), bend)

    def bend(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> Tensor:
        return noise["bend"]

    def bent(self, t: Tensor, bend: Tensor) -> Tensor:
        return LinearSchedule.forward(self, t + 0.5 * bend.to(t.dtype) * t * (1 - t))


class OneGeneratorForAll(Bent):
    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return super().draw_noise(batch_size, generator[0] if isinstance(generator, Sequence) else generator, device)


class MeanOverTheBatch(Bent):
    def bend(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> Tensor:
        return noise["bend"].mean(0, keepdim=True).expand_as(noise["bend"])


class LooksAtTheData(Bent):
    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return {}

    def bend(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros(1, 1, 1, 1) if x is None else x.mean((1, 2, 3), keepdim=True)


class LooksOnceTrained(LearnedLinearSchedule):
    """At the data, by a weight that is zero at first."""

    scalar = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def to_config(self) -> dict[str, Any]:
        return {}

    def bake(self) -> NoiseSchedule:
        return self

    def variance_parameters(self) -> set[str]:
        return set()

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], Gamma]:
        seen = torch.zeros(1, 1, 1, 1) if x is None else x.mean((1, 2, 3), keepdim=True)
        return {}, lambda t: self(t).reshape(-1, 1, 1, 1) + self.weight.to(t.dtype) * seen.to(t.dtype)


class MixesOnceTrained(LooksOnceTrained):
    """The data of a batch, by a weight that is zero at first."""

    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return {"shift": normal_noise((batch_size, 1, 1, 1), generator, device)}

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], Gamma]:
        shift = noise["shift"].mean(0, keepdim=True)
        return {}, lambda t: self(t).reshape(-1, 1, 1, 1) + self.weight.to(t.dtype) * shift.to(t.dtype)


class PaysNothing(Bent):
    """For what its latent tells of the data."""

    def bend(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> Tensor:
        return noise["bend"] + (0 if x is None else x.mean((1, 2, 3), keepdim=True))


class IsPaid(PaysNothing):
    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        return ({} if x is None else {"latent": -torch.ones(len(x))}), super().bind(x, noise)[1]


class UndeclaredSchedule(Linear):
    pass


# ---- targets --------------------------------------------------------------------------------------------------------


class ScaledByTheBatch(Parameterization):
    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(gamma), torch.ones_like(gamma) + 0.5 * torch.tanh(gamma.mean())


class TheLatentItself(Parameterization):
    """``x + eps``, which is proportional to z_t where alpha = sigma."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gamma), torch.ones_like(gamma)


class WrongTarget(Epsilon):
    def target(self, x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
        return -super().target(x, eps, gamma)


class ClippedData(Epsilon):
    def x_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        return super().x_hat(output, z, gamma).clamp(-1, 1)


class WrongNoise(Epsilon):
    def eps_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        return 0.99 * output

    def score_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        return -output / broadcast(sigma(gamma), z)


class ScoreOfTheWrongSign(Epsilon):
    def score_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        return -super().score_hat(output, z, gamma)


class RobustLoss(Epsilon):
    def eps_error(self, output: Tensor, x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
        return super().eps_error(output, x, eps, gamma).clamp(max=36)


class GammaOfTheFirstPixel(Epsilon):
    def x_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        return super().x_hat(output, z, gamma.flatten(1)[:, 0] if gamma.ndim > 1 else gamma)


class NegativeScale(Epsilon):
    def output_scale(self, gamma: Tensor) -> Tensor:
        return -torch.ones_like(gamma)


class RawScore(Score):
    def output_scale(self, gamma: Tensor) -> Tensor:
        return torch.ones_like(gamma)


class AlmostTheLatent(Parameterization):
    """Invertible, with d = 2e-5 everywhere: the data are in digits that float32 does not have."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return alpha(gamma) + 2e-5 * sigma(gamma), sigma(gamma) - 2e-5 * alpha(gamma)


class ForgetsItsFactor(Epsilon):
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(gamma), self.factor * torch.ones_like(gamma)


class UndeclaredTarget(Epsilon):
    pass


# ---- conditionings --------------------------------------------------------------------------------------------------


class FarFromZero(AffineConditioning):
    """Timesteps between which float32 sees no difference."""

    integer_timesteps = False

    def __call__(self, gamma: Tensor) -> Tensor:
        return super().__call__(gamma) + 1e9

    def inverse(self, timestep: Tensor) -> Tensor:
        return super().inverse(timestep - 1e9)


class AlwaysDouble(AffineConditioning):
    def __call__(self, gamma: Tensor) -> Tensor:
        return super().__call__(gamma).double()


class WrongInverse(AffineConditioning):
    def inverse(self, timestep: Tensor) -> Tensor:
        return super().inverse(timestep) + 0.01


class ForgetsItsConstants(AffineConditioning):
    def to_config(self) -> dict[str, Any]:
        return {}


class SaysItHasIntegers(AffineConditioning):
    """And they are half of them: what a schedule spans is 0 to 499."""

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> AffineConditioning:
        return cls(num_train_timesteps=num_train_timesteps // 2)


class MakesAnother(AffineConditioning):
    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> AffineConditioning:
        return AffineConditioning.from_schedule(schedule, num_train_timesteps)


class UndeclaredConditioning(AffineConditioning):
    pass


# ---- forward processes ----------------------------------------------------------------------------------------------


class Process(GaussianProcess):
    """The Gaussian process under a name of its own; ``bound`` is the class that it is bound as."""

    bound: type[BoundGaussian] = BoundGaussian

    def __init__(self, *parts: Any, **more: Any) -> None:
        if not parts and not more:
            parts = (LinearSchedule(-7.87), Epsilon(), AffineConditioning(-7.87), FactorisedDecoder())
            parts += (DataScaling("bin_centers", 17),)
        super().__init__(*parts, **more)

    def fields(self) -> dict[str, Any]:
        found = registry.registration_of("forward_processes", type(self))
        return super().fields() | {"forward_process": found.name if found else "gaussian"}

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundGaussian]:
        extras, gamma = self.schedule.bind(x, noise)
        return extras, self.bound(self, gamma)


class DoesNotClamp(Process):
    def quantise(self, x: Tensor) -> Tensor:
        return ((x - self.scaling.first) / self.scaling.spacing).round().long()


class NoiseOfTheFirst(Process):
    def draw_noise(self, shape: Any, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return super().draw_noise(shape, generator[0] if isinstance(generator, Sequence) else generator, device)


class PriorWithAnAxisTooMany(Process):
    class bound(BoundGaussian):
        def prior_kl(self, x: Tensor) -> Tensor:
            return super().prior_kl(x)[:, None]


class NegativePrior(Process):
    """Less than nothing by a hundredth of a nat, where nothing is right."""

    def __init__(self, *parts: Any, **more: Any) -> None:
        if not parts and not more:
            parts = (LinearSchedule(-7.87, 13.0), Epsilon(), AffineConditioning(-7.87, 13.0), FactorisedDecoder())
            parts += (DataScaling("bin_centers", 17),)
        super().__init__(*parts, **more)

    class bound(BoundGaussian):
        def prior_kl(self, x: Tensor) -> Tensor:
            return super().prior_kl(x) - 0.01


class MeanPrior(Process):
    class bound(BoundGaussian):
        def prior_kl(self, x: Tensor) -> Tensor:
            return super().prior_kl(x).mean().expand(len(x))


class OneTimestepForAll(Process):
    class bound(BoundGaussian):
        def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
            return super().predict(lambda sample, timestep: network(sample, timestep[0]), z_t, t)


class RateWithoutGradient(Process):
    class bound(BoundGaussian):
        def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return super().kl_rate(x, t, noise, network).detach()


class TwiceTheRate(Process):
    class bound(BoundGaussian):
        def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return 2 * super().kl_rate(x, t, noise, network)


class AnotherModelsVariance(Process):
    """What a reverse variance that is not the posterior's costs, whatever the network says."""

    class bound(BoundGaussian):
        def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return super().transition_kl(x, s, t, noise, network) + 64 * (t - s)

        def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return super().kl_rate(x, t, noise, network) + 64


class StepsAside(Process):
    class bound(BoundGaussian):
        def reverse_step(
            self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Any
        ) -> tuple[Tensor, Tensor]:
            z_s, x_hat = super().reverse_step(output, z_t, s, t, generator)
            return z_s + 0.3, x_hat


class StepWithoutNoise(Process):
    class bound(BoundGaussian):
        def reverse_step(
            self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Any
        ) -> tuple[Tensor, Tensor]:
            one, x_hat = super().reverse_step(output, z_t, s, t, torch.Generator().manual_seed(0))
            eps = normal_noise(z_t.shape, torch.Generator().manual_seed(0), z_t.device, z_t.dtype)
            gamma_s, gamma_t = self.gamma(s), self.gamma(t)
            return one - (torch.sigmoid(gamma_s) * -torch.expm1(gamma_s - gamma_t)).sqrt() * eps, x_hat


class TenthOfTheDiffusion(Process):
    class bound(BoundGaussian):
        def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return 0.1 * super().transition_kl(x, s, t, noise, network)

        def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return 0.1 * super().kl_rate(x, t, noise, network)


class NoPrior(Process):
    class bound(BoundGaussian):
        def prior_kl(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x))


class WidePrior(Process):
    class bound(BoundGaussian):
        def prior_sample(self, shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
            return 5 * super().prior_sample(shape, generator, device)


class PosteriorOfMoreVariance(Process):
    class bound(BoundGaussian):
        def posterior_kernel(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseKernel:
            kernel = super().posterior_kernel(x, z_t, s, t)
            return ReverseKernel(kernel.mean, 1.2 * kernel.scale)


class NoReconstruction(Process):
    class bound(BoundGaussian):
        def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
            return x.new_zeros(len(x))


class ScoresBlackImages(Process):
    class bound(BoundGaussian):
        def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
            return super().reconstruction(torch.zeros_like(levels), x, noise, network)


class ExpectsNothing(Process):
    def reconstruction_by_level(self) -> Tensor:
        return torch.zeros(self.num_levels, dtype=torch.float64)


class DecodesToTheNegative(Process):
    class bound(BoundGaussian):
        def decode(self, z_0: Tensor, network: Network, generator: Any) -> Tensor:
            return 16 - super().decode(z_0, network, generator)


class AnyValueAlike(Process):
    has_discrete_latents = True

    class bound(BoundGaussian):
        def transition_probabilities(self, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return torch.full((*z_s.shape, 17), 1 / 17)

        def reverse_probabilities(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return torch.full((*z_t.shape, 17), 1 / 17)


class NoEstimate(Process):
    class bound(BoundGaussian):
        def reverse_step(
            self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Any
        ) -> tuple[Tensor, Tensor]:
            z_s, x_hat = super().reverse_step(output, z_t, s, t, generator)
            return z_s, torch.zeros_like(x_hat)


class TrainedBackwards(Process):
    class bound(BoundGaussian):
        def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return super().transition_kl(x, s, t, noise, lambda sample, timestep: network(sample, 999 - timestep))

        def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
            return super().kl_rate(x, t, noise, lambda sample, timestep: network(sample, 999 - timestep))


class DecodesToPixels(Process):
    class bound(BoundGaussian):
        def decode(self, z_0: Tensor, network: Network, generator: Any) -> Tensor:
            return super().decode(z_0, network, generator).float()


class CorruptsWhatIsGiven(Process):
    def bind_given(self, x: Tensor, noise: Noise, given: Tensor) -> tuple[dict[str, Tensor], BoundGaussian]:
        return self.bind(x, noise)


class TimestepsFromTheEnd(Process):
    def timestep(self, t: Tensor) -> Tensor:
        return super().timestep(1 - t)

    def time(self, timestep: Tensor) -> Tensor:
        return 1 - super().time(timestep)


class ForgetsItsDecoder(Process):
    def fields(self) -> dict[str, Any]:
        return super().fields() | {"decoder": "ddpm"}


class UndeclaredProcess(Process):
    pass


# ---- networks -------------------------------------------------------------------------------------------------------


class PlainNetwork(ModelMixin, ConfigMixin):
    """Keeps every law."""

    @register_to_config
    def __init__(self, in_channels: int = 1, out_channels: int = 1, sample_size: int = 8, width: int = 4) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, out_channels, 1)
        self.told = nn.Linear(1, width)
        self.grow()

    def grow(self) -> None:
        pass

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        told = self.told(torch.sin(timestep.to(sample).reshape(-1, 1) / 300))
        return (self.out(torch.tanh(self.into(sample) + told[:, :, None, None])),)


class InfiniteAtTheFirstTimestep(PlainNetwork):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (super().forward(sample, timestep)[0] + (1 / timestep.to(sample)).reshape(-1, 1, 1, 1),)


class LessTheMeanOfTheBatch(PlainNetwork):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(sample - sample.mean(0), timestep)


class OnlyATimestepEach(PlainNetwork):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(sample, timestep[: len(sample)])


class DrawsAtTheSeed(PlainNetwork):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        drawn = torch.randn((), generator=torch.Generator().manual_seed(torch.initial_seed()))
        return super().forward(sample + drawn.to(sample), timestep)


class BlindToTheTimestep(PlainNetwork):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(sample, torch.ones_like(timestep))


class AnotherInDouble(PlainNetwork):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (super().forward(sample, timestep)[0] * (1.1 if sample.dtype == torch.float64 else 1.0),)


class UnusedWeight(PlainNetwork):
    def grow(self) -> None:
        self.unused = nn.Parameter(torch.ones(()))


class KeepsANumberToItself(PlainNetwork):
    def grow(self) -> None:
        self.factor = 1 + torch.rand(1, device="cpu").item()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return super().forward(self.factor * sample, timestep)


class ConfiguredByInfinity(PlainNetwork):
    @register_to_config
    def __init__(self, in_channels: int = 1, out_channels: int = 1, cut: float = math.inf) -> None:
        super().__init__()


class UndeclaredNetwork(PlainNetwork):
    pass


# ---- likelihood methods ---------------------------------------------------------------------------------------------


class OneTime(Measurement):
    """The bound at a time of each image's own, and what its pilot found added."""

    method, found = "PlainMethod", 0.0

    def __init__(self, objective: Objective, seed: int, times: int) -> None:
        super().__init__(objective, seed)
        self.times = times

    def fit(self, batches: Batches) -> None:
        self.found = sum(float(batch["levels"].double().mean()) for batch in batches())

    def state(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.found = state["found"]

    def generators(self, batch: Batch, replicate: int) -> list[torch.Generator]:
        return [image_generator(self.seed, replicate, 0, int(i)) for i in batch["indices"]]

    def measure(self, batch: Batch, replicate: int) -> Measured:
        generators = self.generators(batch, replicate)
        times = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        terms = dict(self.objective(batch, times, self.objective.draw_noise(batch, generators)).terms)
        return Measured(terms | {"pilot": torch.full((len(times),), self.found)})

    def protocol(self) -> dict[str, Any]:
        return {"times": self.times}


@dataclass(frozen=True)
class PlainMethod(LikelihoodMethod):
    """Keeps every law."""

    name = "PlainMethod"
    measured = OneTime
    times: int = option(3, "independent times", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        measurement = self.measured(objective, seed, self.times)
        measurement.method = self.name
        return measurement


class IsNotFrozen(PlainMethod):
    name = "IsNotFrozen"

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class ChecksNoRange(PlainMethod):
    name = "ChecksNoRange"

    def __post_init__(self) -> None:
        pass


class ConfiguredByNothing(PlainMethod):
    name = "ConfiguredByNothing"

    def to_config(self) -> dict[str, Any]:
        return {}


class ChoosesNothing(PlainMethod):
    name = "ChoosesNothing"

    def chosen(self) -> dict[str, Any]:
        return {}


class OneTermForTheBatch(PlainMethod):
    name = "OneTermForTheBatch"

    class measured(OneTime):
        def measure(self, batch: Batch, replicate: int) -> Measured:
            return Measured(dict(super().measure(batch, replicate).terms) | {"one_more": torch.tensor(0.5)})


class DrawsByPlaceInTheBatch(PlainMethod):
    name = "DrawsByPlaceInTheBatch"

    class measured(OneTime):
        def generators(self, batch: Batch, replicate: int) -> list[torch.Generator]:
            return [image_generator(self.seed, replicate, 0, place) for place in range(len(batch["indices"]))]


class IgnoresTheSeed(PlainMethod):
    name = "IgnoresTheSeed"

    class measured(OneTime):
        def generators(self, batch: Batch, replicate: int) -> list[torch.Generator]:
            return [image_generator(0, replicate, 0, int(i)) for i in batch["indices"]]


class ForgetsItsPilot(PlainMethod):
    name = "ForgetsItsPilot"

    class measured(OneTime):
        def load_state(self, state: Mapping[str, Any]) -> None:
            pass


class ProtocolOfASet(PlainMethod):
    name = "ProtocolOfASet"

    class measured(OneTime):
        def protocol(self) -> dict[str, Any]:
            return {"times": {3}}


class CallsItselfAnother(PlainMethod):
    name = "another"


# ---- decoders -------------------------------------------------------------------------------------------------------


class PlainDecoder(FactorisedDecoder):
    """Keeps every law; what is broken below changes its likelihood after, or its latent before."""

    def negative_log_likelihood(
        self, levels: Tensor, z_0: Tensor, gamma_0: Tensor, variance: Tensor, x_hat: Predict, scaling: DataScaling
    ) -> Tensor:
        nll = super().negative_log_likelihood(levels, self.latent(z_0), self.gamma(gamma_0), variance, x_hat, scaling)
        return self.changed(nll, z_0)

    def sample(
        self, z_0: Tensor, gamma_0: Tensor, x_hat: Predict, scaling: DataScaling, generator: Any = None
    ) -> Tensor:
        return super().sample(z_0, self.gamma(gamma_0), x_hat, scaling, generator)

    def latent(self, z_0: Tensor) -> Tensor:
        return z_0

    def gamma(self, gamma_0: Tensor) -> Tensor:
        return gamma_0

    def changed(self, nll: Tensor, z_0: Tensor) -> Tensor:
        return nll


class SumsToLess(PlainDecoder):
    def changed(self, nll: Tensor, z_0: Tensor) -> Tensor:
        return nll + 0.1 * z_0[0].numel()


class MeanOverDimensions(PlainDecoder):
    def changed(self, nll: Tensor, z_0: Tensor) -> Tensor:
        return nll / z_0[0].numel()


class DrawsTheNegative(PlainDecoder):
    def sample(
        self, z_0: Tensor, gamma_0: Tensor, x_hat: Predict, scaling: DataScaling, generator: Any = None
    ) -> Tensor:
        return scaling.num_levels - 1 - super().sample(z_0, gamma_0, x_hat, scaling, generator)


class DrawsFromTheFirst(PlainDecoder):
    def sample(
        self, z_0: Tensor, gamma_0: Tensor, x_hat: Predict, scaling: DataScaling, generator: Any = None
    ) -> Tensor:
        first = generator[0] if isinstance(generator, Sequence) else generator
        return super().sample(z_0, gamma_0, x_hat, scaling, first)


class DetachedLatent(PlainDecoder):
    def latent(self, z_0: Tensor) -> Tensor:
        return z_0.detach()


class ExpectsNothingOfLevels(PlainDecoder):
    def expected_by_level(self, gamma_0: float, scaling: DataScaling) -> Tensor:
        return torch.zeros(scaling.num_levels, dtype=torch.float64)


class ForgetsItsSharpness(PlainDecoder):
    def __init__(self, sharpness: float = 0.0) -> None:
        self.sharpness = sharpness

    def gamma(self, gamma_0: Tensor) -> Tensor:
        return gamma_0 - self.sharpness

    def expected_by_level(self, gamma_0: float, scaling: DataScaling) -> None:  # type: ignore[override]
        return None


class UndeclaredDecoder(PlainDecoder):
    pass


# ---- commands -------------------------------------------------------------------------------------------------------


class PlainCommand(Command):
    """Say a word."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("word", help="what is said")

    def run(self, arguments: argparse.Namespace) -> None:
        print(arguments.word)


class NeedsAnArgument(PlainCommand):
    """Say a word loudly."""

    def __init__(self, loudness: int) -> None:
        self.loudness = loudness


class SaysNothing(PlainCommand):
    pass


class HelpThatFails(PlainCommand):
    """Say a part of a word."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("part", help="how much of it, in %")


class UndeclaredCommand(PlainCommand):
    """Say nothing."""


# ---- which breaks what ----------------------------------------------------------------------------------------------

BROKEN: dict[str, dict[str, Callable[[], object]]] = {
    "noise_schedules": {
        "shape_and_dtype": SaysItHasAGammaPerPixel,
        "finite": InfiniteAtTheEnd,
        "strictly_increasing": WithAPlateau,
        "derivative": DetachedTime,
        "parameters_are_trained": UnusedParameter,
        "variance_parameters": VarianceMovesTheEndpoints,
        "endpoints": EndpointsTheOtherWayRound,
        "inverse": InverseWithoutAnEnd,
        "published": PublishesItsInitialValues,
        "json_config": lambda: ForgetsAnArgument(gamma_max=7.0),
        "registered": UndeclaredSchedule,
        "extra_terms": ExtraTermWithATakenName,
        "draws_follow_their_generator": OneGeneratorForAll,
        "data_do_not_mix": MeanOverTheBatch,
        "no_peeking": LooksAtTheData,
        "what_data_tell_is_paid_for": PaysNothing,
    },
    "parameterizations": {
        "coefficients": ScaledByTheBatch,
        "invertible": TheLatentItself,
        "target": WrongTarget,
        "x_hat": ClippedData,
        "eps_hat": WrongNoise,
        "score_hat": ScoreOfTheWrongSign,
        "eps_error": RobustLoss,
        "gamma_per_dimension": GammaOfTheFirstPixel,
        "scales": NegativeScale,
        "sizes": RawScore,
        "one_loss": AlmostTheLatent,
        "json_config": lambda: ForgetsItsFactor(2.0),
        "registered": UndeclaredTarget,
    },
    "conditionings": {
        "strictly_increasing": FarFromZero,
        "elementwise": AlwaysDouble,
        "inverse": WrongInverse,
        "json_config": lambda: ForgetsItsConstants(-9.0),
        "suits_a_schedule": MakesAnother,
        "integer_timesteps": SaysItHasIntegers,
        "registered": UndeclaredConditioning,
    },
    "forward_processes": {
        "levels_round_trip": DoesNotClamp,
        "draws_follow_their_generator": NoiseOfTheFirst,
        "terms": PriorWithAnAxisTooMany,
        "never_negative": NegativePrior,
        "data_do_not_mix": MeanPrior,
        "network_inputs": OneTimestepForAll,
        "gradients_reach_the_network": RateWithoutGradient,
        "rate_is_the_limit": TwiceTheRate,
        "best_output_has_no_kl": AnotherModelsVariance,
        "reverse_step_follows_the_marginal": StepsAside,
        "sampling": DecodesToPixels,
        "given_stays": CorruptsWhatIsGiven,
        "times": TimestepsFromTheEnd,
        "json_config": ForgetsItsDecoder,
        "transition_kl_is_seen": TenthOfTheDiffusion,
        "prior_kl_is_seen": NoPrior,
        "values_are_as_likely_as_said": AnyValueAlike,
        "gaussian_kernels": PosteriorOfMoreVariance,
        "decoder": NoReconstruction,
        "reconstruction_by_level": ExpectsNothing,
        "estimate": NoEstimate,
        "one_timestep": TrainedBackwards,
        "registered": UndeclaredProcess,
    },
    "networks": {
        "output": InfiniteAtTheFirstTimestep,
        "data_do_not_mix": LessTheMeanOfTheBatch,
        "one_timestep_for_all": OnlyATimestepEach,
        "deterministic": DrawsAtTheSeed,
        "reads_the_timestep": BlindToTheTimestep,
        "precision": AnotherInDouble,
        "parameters_are_trained": UnusedWeight,
        "saved_and_loaded": KeepsANumberToItself,
        "json_config": ConfiguredByInfinity,
        "registered": UndeclaredNetwork,
    },
    "likelihood_methods": {
        "frozen": IsNotFrozen,
        "ranges": ChecksNoRange,
        "json_config": lambda: ConfiguredByNothing(2),
        "options_round_trip": lambda: ChoosesNothing(2),
        "terms": OneTermForTheBatch,
        "images_do_not_mix": DrawsByPlaceInTheBatch,
        "replicates_are_draws": IgnoresTheSeed,
        "state_round_trips": ForgetsItsPilot,
        "json_protocol": ProtocolOfASet,
        "registered": CallsItselfAnother,
    },
    "decoders": {
        "normalised": SumsToLess,
        "adds_up": MeanOverDimensions,
        "sampling": DrawsTheNegative,
        "draws_follow_their_generator": DrawsFromTheFirst,
        "gradient": DetachedLatent,
        "expected_by_level": ExpectsNothingOfLevels,
        "json_config": lambda: ForgetsItsSharpness(1.0),
        "registered": UndeclaredDecoder,
    },
    "commands": {
        "built_without_arguments": lambda: NeedsAnArgument(3),
        "says_what_it_does": SaysNothing,
        "helps": HelpThatFails,
        "registered": UndeclaredCommand,
    },
}

OTHERWISE_BROKEN: dict[Callable[[], object], set[str]] = {
    LooksOnceTrained: {"no_peeking"},
    MixesOnceTrained: {"data_do_not_mix"},
    IsPaid: {"what_data_tell_is_paid_for"},
    StepWithoutNoise: {"reverse_step_follows_the_marginal", "transition_kl_is_seen"},
    WidePrior: {"prior_kl_is_seen"},
    ScoresBlackImages: {"decoder"},
    DecodesToTheNegative: {"decoder"},
}
"""More ways to break a law than one."""

SOUND: dict[str, Callable[[], object]] = {
    "noise_schedules": Bent,
    "parameterizations": lambda: ForgetsItsFactor(1.0),
    "conditionings": lambda: ForgetsItsConstants(),
    "forward_processes": Process,
    "networks": PlainNetwork,
    "likelihood_methods": PlainMethod,
    "decoders": PlainDecoder,
    "commands": PlainCommand,
}
"""What most of the above are derived from: none of it breaks any law."""


def declared(kind: str) -> dict[str, type]:
    """What the entry points of this distribution name; all but what is left out to break that law."""
    base: type = {
        "noise_schedules": NoiseSchedule,
        "parameterizations": Parameterization,
        "conditionings": Conditioning,
        "forward_processes": GaussianProcess,
        "networks": ModelMixin,
        "likelihood_methods": LikelihoodMethod,
        "decoders": Decoder,
        "commands": Command,
    }[kind]
    own = [cls for cls in globals().values() if isinstance(cls, type) and cls.__module__ == __name__]
    return {cls.__name__: cls for cls in own if issubclass(cls, base) and not cls.__name__.startswith("Undeclared")}
