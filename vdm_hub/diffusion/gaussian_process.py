"""The Gaussian process of VDM: a noise schedule, a target, a conditioning, a data scaling and a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.conditioning import Conditioning
from vdm_hub.diffusion.continuous_time import DiffusionSDE
from vdm_hub.diffusion.decoders import Decoder
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess, Network, Noise
from vdm_hub.diffusion.gaussian import broadcast, sum_dimensions
from vdm_hub.diffusion.learned_schedules import VarianceGradient
from vdm_hub.diffusion.noise_schedules import DiscreteBetasSchedule, Gamma, NoiseSchedule
from vdm_hub.diffusion.parameterizations import Parameterization
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.diffusion.reverse_variances import PosteriorVariance, ReverseVariance, reverse_variance
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.errors import ConfigurationError


class GaussianProcess(ForwardProcess):
    """``q(z_t|x) = N(alpha_t x, sigma_t^2 I)``, its posterior as the reverse step, and its bound (VDM).

    Args:
        schedule: gamma(t).
        parameterization: What the network predicts.
        conditioning: What the network reads of gamma.
        decoder: ``p(x|z_0)``.
        scaling: How levels become real numbers.
        num_train_timesteps: The range of the timesteps of stock samplers.
        variance: That of the reverse step; the posterior's where not given.

    Attributes:
        variance: That of the reverse step; a table of betas may ask for another than the posterior's.
        clipping: What is done to every estimate of the data before it is used: ``None`` unless it was set, as a model
            with clipped estimates is another one.
        unread_half: Whether the network gives twice the channels, of which the second half, a variance, is not read:
            false unless it was set.

    >>> process = GaussianProcess.from_fields({"num_levels": 256})
    >>> process.encode(torch.tensor([[0, 255]]))
    tensor([[-0.9961,  0.9961]])
    """

    has_gaussian_kernels = True

    def __init__(
        self,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        conditioning: Conditioning,
        decoder: Decoder,
        scaling: DataScaling,
        num_train_timesteps: int = 1000,
        variance: ReverseVariance | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.variance = PosteriorVariance() if variance is None else variance
        self.clipping: Callable[[Tensor], Tensor] | None = None
        self.unread_half = False
        self.parameterization, self.conditioning = parameterization, conditioning
        self.decoder, self.scaling = decoder, scaling
        self.num_levels, self.num_train_timesteps = scaling.num_levels, num_train_timesteps

    @property
    def context_size(self) -> int | None:
        return self.schedule.context_size

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> GaussianProcess:
        steps = fields.get("num_train_timesteps", 1000)
        if schedule is None:
            betas = {"betas": fields["trained_betas"]} if fields.get("trained_betas") is not None else {}
            schedule = registry.build("noise_schedules", fields.get("noise_schedule", "linear"), **betas)
        if not isinstance(schedule, NoiseSchedule):
            raise ConfigurationError(f"{type(schedule).__name__} is not a NoiseSchedule: derive it from that class.")
        target = registry.build("parameterizations", fields.get("prediction_type", "epsilon"))
        if not isinstance(target, Parameterization):
            raise ConfigurationError(f"{type(target).__name__} is not a Parameterization: derive it from that class.")
        scaling = DataScaling(fields.get("data_scaling", "bin_centers"), fields.get("num_levels", 256))
        decoder = registry.build("decoders", fields.get("decoder", "factorised"))
        conditioning = _conditioning(fields.get("conditioning") or "affine", schedule, steps)
        is_table = isinstance(schedule, DiscreteBetasSchedule)
        variance = reverse_variance(fields.get("variance_type") or "fixed_small") if is_table else None
        return cls(schedule, target, conditioning, decoder, scaling, steps, variance)

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

    @property
    def scalar_gamma(self) -> NoiseSchedule | None:
        return self.schedule if self.schedule.scalar else None

    def check_shape(self, shape: Sequence[int]) -> None:
        if self.scalar_gamma is not None:
            return
        device = next((one.device for one in self.parameters()), torch.device("cpu"))
        noise = self.draw_context((1, *shape), torch.Generator().manual_seed(0), device)
        gamma = self.schedule.bind(None, noise)[1](torch.full((1,), 0.5, dtype=torch.float64, device=device))
        own = tuple(gamma.shape[1:])
        if len(own) > len(shape) or any(one not in (1, size) for one, size in zip(own, shape, strict=False)):
            raise ConfigurationError(
                f"{type(self.schedule).__name__} has a gamma for each pixel of {own}, and the network takes "
                f"{tuple(shape)}: give the schedule the shape of the network's data."
            )

    def encode(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scaling.encode(levels, dtype)

    def quantise(self, x: Tensor) -> Tensor:
        return self.scaling.nearest(x)

    @property
    def is_plain(self) -> bool:
        """Whether its bound is this class's own, at one gamma that nothing but t decides: what closed forms need."""
        own = type(self).bind is GaussianProcess.bind and type(self.schedule).bind is NoiseSchedule.bind
        return own and self.schedule.scalar

    def reconstruction_by_level(self) -> Tensor | None:
        if not self.is_plain:
            return None
        return self.decoder.expected_by_level(self.schedule.endpoints()[0], self.scaling)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sample's; of twice the channels where the network says a variance, too."""
        return (shape[0] * (2 if self.variance.learned or self.unread_half else 1), *shape[1:])

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output in two: for the mean and, where it has twice the channels, for the variance.

        Raises:
            ConfigurationError: The variance is learned, and the network has not twice the channels.
        """
        if not self.variance.learned:
            return (output[:, : like.shape[1]] if self.unread_half else output), output
        if output.shape[1] != 2 * like.shape[1]:
            raise ConfigurationError(
                f"the variance is learned, and the network gives {output.shape[1]} channels for images of "
                f"{like.shape[1]}, not twice as many: give the variance_type that it was trained with."
            )
        mean, variance = output.chunk(2, dim=1)
        return mean, variance

    def x_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        """The estimate of the data that the network's prediction implies, `clipping` included."""
        x_hat = self.parameterization.x_hat(self.split(output, z)[0], z, gamma)
        return x_hat if self.clipping is None else self.clipping(x_hat)

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
        context = getattr(gamma, "context", None)
        self._context = {} if context is None else {"context": context}

    @property
    def sde(self) -> DiffusionSDE:
        """The stochastic differential equation of its latents, forward and back."""
        return DiffusionSDE(self.gamma)

    def score(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        """The network's ``grad log q(z_t)`` at time t, (), whatever its target is (Luo eq. 151)."""
        gamma = broadcast(self._gamma(t, z_t), z_t).to(torch.promote_types(z_t.dtype, torch.float32))
        output = self.process.split(self.predict(network, z_t, t), z_t)[0]
        return self.process.parameterization.score_hat(output, z_t, gamma)

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        return gaussian.marginal_sample(x, self.gamma(t), noise["marginal"])

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        return self._predict(network, z_t, self._gamma(t, z_t))

    def _predict(self, network: Network, z: Tensor, gamma: Tensor) -> Tensor:
        parameterization = self.process.parameterization
        level = gamma.flatten(1).mean(1) if gamma.ndim > 1 else gamma  # one number a datum for the network
        timestep = self.process.conditioning(level).to(torch.promote_types(z.dtype, torch.float32)).expand(z.shape[0])
        gamma = broadcast(gamma, z)
        output = network((parameterization.input_scale(gamma) * z).to(z.dtype), timestep, **self._context)
        output = output.to(z.dtype)
        if not self.process.variance.learned:
            mean = self.process.split(output, z)[0]
            return (parameterization.output_scale(gamma) * mean).to(z.dtype)
        mean, variance = self.process.split(output, z)
        return torch.cat([(parameterization.output_scale(gamma) * mean).to(z.dtype), variance], dim=1)

    def predict_noise(self, network: Network, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``eps_hat(z, gamma)`` whatever the target is, clipped if the data are; and what is said of the variance.

        Args:
            network: See `Network`.
            z: Latents, (B, *data).
            gamma: Theirs, (B,), or for each pixel.
        """
        process, level = self.process, broadcast(gamma, z)
        output = self._predict(network, z, gamma)
        mean, variance = process.split(output, z)
        if process.clipping is None:
            return process.parameterization.eps_hat(mean, z, level), variance
        x_hat = process.x_hat(output, z, level)
        return (z - gaussian.alpha(level) * x_hat) / gaussian.sigma(level), variance

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``1/2 expm1(gamma_t - gamma_s) |eps - eps_hat|^2`` (VDM eq. 13 and 14); see `gaussian.transition_kl`."""
        gamma_s, gamma_t = self.gamma(s), self.gamma(t)
        error, prediction = self._error(x, gamma_t, noise, network)
        weight, variance = torch.expm1(gamma_t - gamma_s), self.process.variance
        if variance.is_posterior:
            return _weighted(weight, error)
        log_ratio = variance.log_ratio(prediction, broadcast(gamma_s, x), broadcast(gamma_t, x))
        return sum_dimensions(gaussian.transition_kl(error, broadcast(weight, x), log_ratio))

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``1/2 gamma'(t) |eps - eps_hat|^2`` (VDM eq. 17)."""
        self.process.variance.check_continuous()
        schedule_gradient = VarianceGradient(self.process.schedule, self.gamma)
        gamma_t, gamma_prime = schedule_gradient(t)
        error, _ = self._error(x, gamma_t, noise, network)
        rate = _weighted(gamma_prime, error)
        return schedule_gradient.tell(rate, x[0].numel())

    def _error(self, x: Tensor, gamma: Tensor, noise: Noise, network: Network) -> tuple[Tensor, Tensor]:
        """``|eps - eps_hat|^2`` elementwise, and what the network says of the variance."""
        process, eps = self.process, noise["marginal"]
        z = gaussian.marginal_sample(x, gamma, eps)
        output = self._predict(network, z, gamma)
        mean, variance = process.split(output, x)
        if process.clipping is None:
            return process.parameterization.eps_error(mean, x, eps, gamma), variance
        return torch.exp(-broadcast(gamma, x)) * (x - process.x_hat(output, z, gamma)) ** 2, variance

    def prior_kl(self, x: Tensor) -> Tensor:
        return gaussian.prior_kl(x, self._at(1.0, x))

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        gamma_0 = self._at(0.0, x)
        z_0 = gaussian.marginal_sample(x, gamma_0, noise["reconstruction"])
        variance, process = self._first_posterior_variance(x), self.process
        predict = self._x_hat(network, z_0, gamma_0)
        if process.variance.learned:  # one call for both
            output = self._predict(network, z_0, gamma_0)
            prediction = process.split(output, z_0)[1]
            posterior, level = broadcast(variance, x), broadcast(gamma_0, x)
            variance = process.variance.log_first(prediction, posterior, level).exp()
            predict = lambda: process.x_hat(output, z_0, gamma_0)  # noqa: E731
        return process.decoder.negative_log_likelihood(levels, z_0, gamma_0, variance, predict, process.scaling)

    def terms_by_dimension(
        self, levels: Tensor, x: Tensor, t: Tensor, noise: Noise, network: Network
    ) -> dict[str, Tensor]:
        self.process.variance.check_continuous()
        gamma_t, gamma_prime = VarianceGradient(self.process.schedule, self.gamma)(t)
        error, _ = self._error(x, gamma_t, noise, network)
        return {
            "reconstruction": self._reconstruction_by_dimension(levels, x, noise, network),
            "prior": gaussian.prior_kl_by_dimension(x, self._at(1.0, x)),
            "diffusion": 0.5 * broadcast(gamma_prime, x) * error,
        }

    def _reconstruction_by_dimension(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        """By quadrature where the decoder allows it, as the bound is measured; else by one draw.

        Given the network's estimate a decoder is asked for each dimension as if it were a datum of its own.
        """
        if (known := self.process.reconstruction_by_level()) is not None:
            return known.to(x.device)[levels.long()].to(x.dtype)
        if self.process.variance.learned:
            raise ConfigurationError(
                "the network says the variance of the step onto the data, and bits by dimension of that are not "
                "known: ask for the terms as a whole (log_likelihood)."
            )
        gamma_0 = broadcast(self._at(0.0, x), x).expand_as(x)
        z_0 = gaussian.marginal_sample(x, gamma_0, noise["reconstruction"])
        x_hat = self._x_hat(network, z_0, self._at(0.0, x))()
        variance = broadcast(self._first_posterior_variance(x), x).expand_as(x)
        alone, z, gamma, spread, estimate = (one.reshape(-1, 1) for one in (levels, z_0, gamma_0, variance, x_hat))
        decoder, scaling = self.process.decoder, self.process.scaling
        return decoder.negative_log_likelihood(alone, z, gamma, spread, lambda: estimate, scaling).view_as(x)

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        return normal_noise(shape, generator, device)

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        x_hat, kernel = self.reverse_kernel(output, z_t, s, t)
        eps = normal_noise(z_t.shape, generator, z_t.device, z_t.dtype)
        return kernel.sample(eps).to(z_t.dtype), x_hat.to(z_t.dtype)

    def reverse_kernel(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ReverseKernel]:
        gamma_s, gamma_t = self._gamma(s, z_t), self._gamma(t, z_t)
        x_hat = self.process.x_hat(output, z_t, gamma_t)
        ratio = self._variance_ratio(self.process.split(output, z_t)[1], z_t, gamma_s, gamma_t)
        return x_hat, ReverseKernel.from_data(z_t, x_hat, gamma_s, gamma_t, ratio)

    def marginal_kernel(self, x: Tensor, t: Tensor) -> ReverseKernel:
        gamma = broadcast(self._gamma(t, x), x)
        return ReverseKernel(gaussian.alpha(gamma) * x, gaussian.sigma(gamma))

    def posterior_kernel(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseKernel:
        return ReverseKernel.from_data(z_t, x, self._gamma(s, z_t), self._gamma(t, z_t))

    def predict_kernel(self, network: Network, z_t: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> ReverseKernel:
        """``p(z_s|z_t)`` from the network, at two gammas: see `predict_noise`."""
        eps_hat, prediction = self.predict_noise(network, z_t, gamma_t)
        ratio = self._variance_ratio(prediction, z_t, gamma_s, gamma_t)
        return ReverseKernel.from_noise(z_t, eps_hat, gamma_s, gamma_t, ratio)

    def _variance_ratio(self, prediction: Tensor, z_t: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor | None:
        """``log(v_q / v_p)``, or ``None`` where it is zero."""
        if self.process.variance.is_posterior:
            return None
        return self.process.variance.log_ratio(prediction, broadcast(gamma_s, z_t), broadcast(gamma_t, z_t))

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        gamma_0 = self._at(0.0, z_0)
        predict = self._x_hat(network, z_0, gamma_0)
        return self.process.decoder.sample(z_0, gamma_0, predict, self.process.scaling, generator)

    def _x_hat(self, network: Network, z: Tensor, gamma: Tensor) -> Any:
        return lambda: self.process.x_hat(self._predict(network, z, gamma), z, gamma)

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


def _weighted(weight: Tensor, error: Tensor) -> Tensor:
    """``1/2 weight error`` summed over dimensions, weight of shape (B,) or that of the error."""
    if weight.ndim < 2:
        return 0.5 * weight * sum_dimensions(error)
    return 0.5 * sum_dimensions(weight * error)


def gaussian_of(process: ForwardProcess) -> GaussianProcess:
    """The process itself, where it is a Gaussian one of the data themselves; else an error.

    Raises:
        ConfigurationError: It is another.
    """
    if isinstance(process, GaussianProcess):
        return process
    raise ConfigurationError(
        f"{type(process).__name__} is not a Gaussian process of the data, which this likelihood needs: ask for the "
        f"variational bound instead (method='bound')."
    )


def scalar_gaussian(process: ForwardProcess) -> GaussianProcess:
    """The process, where one gamma a time describes it.

    Raises:
        ConfigurationError: It is another process, or its gamma differs between pixels or data.
    """
    if gaussian_of(process).scalar_gamma is not None:
        return gaussian_of(process)
    raise ConfigurationError(
        f"{type(gaussian_of(process).schedule).__name__} has a gamma of its own for each pixel, and this form of the "
        f"bound needs one gamma per time: ask for the variational bound as it is trained (method='bound')."
    )
