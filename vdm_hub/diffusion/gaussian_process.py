"""The Gaussian process of VDM: a noise schedule, a target, a conditioning, a data scaling and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.conditioning import Conditioning
from vdm_hub.diffusion.decoders import Decoder
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess, Network, Noise
from vdm_hub.diffusion.gaussian import broadcast, sum_dimensions
from vdm_hub.diffusion.learned_schedules import VarianceGradient
from vdm_hub.diffusion.levels import DataScaling
from vdm_hub.diffusion.noise_schedules import Gamma, NoiseSchedule
from vdm_hub.diffusion.parameterizations import Parameterization
from vdm_hub.errors import ConfigurationError


class GaussianProcess(ForwardProcess):
    """``q(z_t|x) = N(alpha_t x, sigma_t^2 I)``, its posterior as the reverse step, and its bound (VDM).

    >>> process = GaussianProcess.from_fields({"num_levels": 256})
    >>> process.encode(torch.tensor([[0, 255]]))
    tensor([[-0.9961,  0.9961]])
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        conditioning: Conditioning,
        decoder: Decoder,
        scaling: DataScaling,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.parameterization, self.conditioning = parameterization, conditioning
        self.decoder, self.scaling = decoder, scaling
        self.num_levels, self.num_train_timesteps = scaling.num_levels, num_train_timesteps

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> GaussianProcess:
        steps = fields.get("num_train_timesteps", 1000)
        if schedule is None:
            betas = {"betas": fields["trained_betas"]} if fields.get("trained_betas") is not None else {}
            schedule = registry.build("noise_schedules", fields.get("noise_schedule", "linear"), **betas)
        if not isinstance(schedule, NoiseSchedule):
            raise ConfigurationError(f"{type(schedule).__name__} is not a NoiseSchedule: derive it from that class.")
        parameterization = registry.build("parameterizations", fields.get("prediction_type", "epsilon"))
        if not isinstance(parameterization, Parameterization):
            name = type(parameterization).__name__
            raise ConfigurationError(f"{name} is not a Parameterization: derive it from that class.")
        scaling = DataScaling(fields.get("data_scaling", "bin_centers"), fields.get("num_levels", 256))
        decoder = registry.build("decoders", fields.get("decoder", "factorised"))
        conditioning = _conditioning(fields.get("conditioning") or "affine", schedule, steps)
        return cls(schedule, parameterization, conditioning, decoder, scaling, steps)

    def fields(self) -> dict[str, Any]:
        return {
            "forward_process": "gaussian",
            "noise_schedule": registry.serialise("noise_schedules", self.schedule.bake()),
            "prediction_type": registry.serialise("parameterizations", self.parameterization),
            # Complete: its name alone would mean constants from the schedule, which has moved since.
            "conditioning": registry.serialise("conditionings", self.conditioning, complete=True),
            "decoder": registry.serialise("decoders", self.decoder),
            "data_scaling": self.scaling.name,
            "num_levels": self.num_levels,
            "num_train_timesteps": self.num_train_timesteps,
        }

    def carried_schedule(self) -> NoiseSchedule | None:
        published = self.schedule.bake()
        return published if published.state_dict() else None

    def encode(self, levels: Tensor) -> Tensor:
        return self.scaling.encode(levels)

    def quantise(self, x: Tensor) -> Tensor:
        return self.scaling.nearest(x)

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        draws = {name: normal_noise(shape, generator, device) for name in ("marginal", "reconstruction")}
        return draws | self.draw_context(shape, generator, device)

    def draw_context(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        return self.schedule.draw_noise(shape[0], generator, device)

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundGaussian]:
        extras, gamma = self.schedule.bind(x, noise)
        return extras, BoundGaussian(self, gamma)

    def timestep(self, t: Tensor) -> Tensor:
        if not self.schedule.scalar:
            return super().timestep(t)
        with torch.no_grad():
            return self.conditioning(self.schedule(t.double()))

    def time(self, timestep: Tensor) -> Tensor:
        if not self.schedule.scalar:
            return super().time(timestep)
        return self.schedule.inverse(self.conditioning.inverse(timestep.double()))


def _conditioning(serialised: Any, schedule: NoiseSchedule, steps: int) -> Conditioning:
    cls, arguments = registry.resolve("conditionings", serialised)
    if arguments:
        built: Conditioning = registry.build("conditionings", serialised, num_train_timesteps=steps)
        return built
    if not issubclass(cls, Conditioning):
        raise ConfigurationError(f"{cls.__name__} is not a Conditioning: derive it from that class.")
    return cls.from_schedule(schedule, steps)


class BoundGaussian(BoundProcess):
    """The Gaussian process on one batch; gamma is a function of t alone by now."""

    def __init__(self, process: GaussianProcess, gamma: Gamma) -> None:
        self.process, self.gamma = process, gamma

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        return gaussian.marginal_sample(x, self.gamma(t), noise["marginal"])

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        return self._predict(network, z_t, self._gamma(t, z_t))

    def _predict(self, network: Network, z: Tensor, gamma: Tensor) -> Tensor:
        parameterization = self.process.parameterization
        level = gamma.flatten(1).mean(1) if gamma.ndim > 1 else gamma  # one number a datum for the network
        timestep = self.process.conditioning(level).to(torch.promote_types(z.dtype, torch.float32)).expand(z.shape[0])
        gamma = broadcast(gamma, z)
        output = network((parameterization.input_scale(gamma) * z).to(z.dtype), timestep)
        return parameterization.output_scale(gamma) * output.to(z.dtype)

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``1/2 expm1(gamma_t - gamma_s) |eps - eps_hat|^2`` (VDM eq. 13 and 14)."""
        gamma_s, gamma_t = self.gamma(s), self.gamma(t)
        return self._kl(x, gamma_t, torch.expm1(gamma_t - gamma_s), noise, network)

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``1/2 gamma'(t) |eps - eps_hat|^2`` (VDM eq. 17)."""
        schedule_gradient = VarianceGradient(self.process.schedule, self.gamma)
        gamma_t, gamma_prime = schedule_gradient(t)
        rate = self._kl(x, gamma_t, gamma_prime, noise, network)
        return schedule_gradient.tell(rate, x[0].numel())

    def _kl(self, x: Tensor, gamma: Tensor, weight: Tensor, noise: Noise, network: Network) -> Tensor:
        eps = noise["marginal"]
        output = self._predict(network, gaussian.marginal_sample(x, gamma, eps), gamma)
        error = self.process.parameterization.eps_error(output, x, eps, gamma)
        if weight.ndim < 2:
            return 0.5 * weight * sum_dimensions(error)
        return 0.5 * sum_dimensions(weight * error)

    def prior_kl(self, x: Tensor) -> Tensor:
        return gaussian.prior_kl(x, self._at(1.0, x))

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        gamma_0 = self._at(0.0, x)
        z_0 = gaussian.marginal_sample(x, gamma_0, noise["reconstruction"])
        variance = self._first_posterior_variance(x)
        predict = self._x_hat(network, z_0, gamma_0)
        decoder = self.process.decoder
        return decoder.negative_log_likelihood(levels, z_0, gamma_0, variance, predict, self.process.scaling)

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        return normal_noise(shape, generator, device)

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        gamma_s, gamma_t = self._gamma(s, z_t), self._gamma(t, z_t)
        x_hat = self.process.parameterization.x_hat(output, z_t, gamma_t)
        eps = normal_noise(z_t.shape, generator, z_t.device, z_t.dtype)
        return gaussian.posterior_step(z_t, x_hat, gamma_s, gamma_t, eps).to(z_t.dtype), x_hat.to(z_t.dtype)

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        gamma_0 = self._at(0.0, z_0)
        predict = self._x_hat(network, z_0, gamma_0)
        return self.process.decoder.sample(z_0, gamma_0, predict, self.process.scaling, generator)

    def _x_hat(self, network: Network, z: Tensor, gamma: Tensor) -> Any:
        return lambda: self.process.parameterization.x_hat(self._predict(network, z, gamma), z, gamma)

    def _gamma(self, t: Tensor, like: Tensor) -> Tensor:
        """``gamma(t)`` for t of shape (B,) or (); schedules that are not scalar only ever see (B,)."""
        return self.gamma(t if self.process.schedule.scalar else t.expand(like.shape[0]))

    def _at(self, time: float, like: Tensor) -> Tensor:
        """``gamma`` at one end, for every datum of the batch."""
        return self.gamma(torch.full((like.shape[0],), time, device=like.device, dtype=like.dtype))

    def _first_posterior_variance(self, like: Tensor) -> Tensor:
        gamma_0 = self._at(0.0, like)
        gamma_1 = self._at(1 / (self.process.num_train_timesteps - 1), like)
        return gaussian.posterior(gamma_0, gamma_1)[2]
