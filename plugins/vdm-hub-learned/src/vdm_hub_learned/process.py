r"""The forward process whose latents' mean is learned: ``q(z_t|x) = N(alpha_t m(x, t), sigma_t^2 I)``.

DiffEnc (Nielsen et al., arXiv 2310.19789) and the affine form of Neural Flow Diffusion Models (Bartosh et al., arXiv
2404.12940). With ``m_t = m(x, t)`` and ``c = -expm1(gamma_s - gamma_t)``, s < t, the posterior

    q(z_s|z_t, x) = N(alpha_s m_s + (1 - c) (alpha_s / alpha_t) (z_t - alpha_t m_t), sigma_s^2 c I)

has the marginals above: from ``z_t - alpha_t m_t = sigma_t eps``, the variance is
``(1-c)^2 (alpha_s/alpha_t)^2 sigma_t^2 + sigma_s^2 c = sigma_s^2``. It is VDM's posterior (VDM eq. 29 to 32) at the
data m_t, moved by ``alpha_s (m_s - m_t)``. The reverse kernel has the network's x_hat in the place of x. With
``delta_t = m(x, t) - m(x_hat, t)``, x_hat the estimate at t in both, the means differ by
``alpha_s (delta_s - (1-c) delta_t)``, the variances not, and

    KL = e^{-gamma_s}/(2 c) |delta_s - (1-c) delta_t|^2
       = 1/2 expm1(gamma_t - gamma_s) e^{-gamma_t} |delta_t - (delta_t - delta_s)/c|^2.

In small steps ``c = gamma' dt`` and ``delta_t - delta_s = d_t delta dt``, so its rate is

    e^{-gamma}/(2 gamma') |gamma' delta - d_t delta|^2,   e^{-gamma} = alpha^2 / sigma^2.

For m = x both are VDM's (eq. 13 and 17), as ``e^{-gamma/2} (x - x_hat) = eps_hat - eps`` up to the sign.

m depends on t through ``u = (gamma_t - gamma_0)/(gamma_1 - gamma_0)``, so that ``d_t m = gamma' d_u m / (gamma_1 -
gamma_0)``: the bound in continuous time then depends on a scalar schedule through its ends alone, as VDM's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub import (
    BoundProcess,
    ConfigurationError,
    ForwardProcess,
    GaussianProcess,
    Generator,
    Network,
    Noise,
    NoiseSchedule,
    ReverseKernel,
    VarianceGradient,
    alpha,
    broadcast,
    marginal_sample,
    normal_noise,
    prior_kl,
    registry,
    sigma,
    sum_dimensions,
)
from vdm_hub_learned.encoders import ConvolutionalEncoder, Encoder, combine


class EncodedProcess(ForwardProcess):
    """A Gaussian process of ``m(x, t)``: schedule, target, timestep, scaling and decoder are those of a VDM.

    As m(x, 0) is x, so is the reconstruction term; the prior term is that of m(x, 1). The network's target is VDM's,
    with ``(z_t - alpha_t x) / sigma_t`` for the noise, so that it determines an estimate of the data.

    Args:
        gaussian: The VDM.
        encoder: m.

    Raises:
        ConfigurationError: The VDM has a gamma per pixel, a latent of its own, or not its posterior's variance.
    """

    has_gaussian_kernels = True
    has_weights = True

    def __init__(self, gaussian: GaussianProcess, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.over(gaussian)

    def over(self, gaussian: GaussianProcess) -> None:
        """Take another VDM for its own; see the class."""
        if not gaussian.is_plain:
            raise ConfigurationError(
                f"the learned process needs one gamma a time, and {type(gaussian.schedule).__name__} has one for each "
                f"pixel or datum: give a noise_schedule such as linear."
            )
        if not gaussian.variance.is_posterior:
            raise ConfigurationError(
                "the learned process steps back with the posterior's variance: leave variance_type out."
            )
        self.gaussian = gaussian
        self.num_levels, self.num_train_timesteps = gaussian.num_levels, gaussian.num_train_timesteps

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> EncodedProcess:
        """Refuse to build: no config holds any encoder.

        Raises:
            ConfigurationError: Always; `LearnedProcess` has a config.
        """
        raise ConfigurationError("no config holds this encoder: build the process of a VDM and the encoder.")

    def fields(self) -> dict[str, Any]:
        return self.gaussian.fields() | {"forward_process": registry.serialise("forward_processes", self)}

    @property
    def scalar_gamma(self) -> NoiseSchedule | None:
        return self.gaussian.scalar_gamma

    def check_shape(self, shape: Sequence[int]) -> None:
        self.encoder.check_shape(tuple(shape))

    def encode(self, levels: Tensor) -> Tensor:
        return self.gaussian.encode(levels)

    def quantise(self, x: Tensor) -> Tensor:
        return self.gaussian.quantise(x)

    def reconstruction_by_level(self) -> Tensor | None:
        return self.gaussian.reconstruction_by_level()

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        return self.gaussian.draw_noise(shape, generator, device)

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundEncoded]:
        """No extra terms; nothing is drawn once for a chain."""
        if x is not None:
            self.check_shape(x.shape[1:])
        return {}, BoundEncoded(self)

    def timestep(self, t: Tensor) -> Tensor:
        return self.gaussian.timestep(t)

    def time(self, timestep: Tensor) -> Tensor:
        return self.gaussian.time(timestep)


class LearnedProcess(EncodedProcess):
    """`EncodedProcess` with a `ConvolutionalEncoder`, which is trained by the bound with the network.

    It starts as the VDM of the same schedule, target and decoder.

    Args:
        data_channels: Of the data.
        width: Of the encoder's hidden layers.
        depth: Its hidden convolutions.
        degree: Of m in u.

    >>> process = LearnedProcess(width=4)
    >>> x = process.encode(torch.tensor([[[[0, 255]]]]))
    >>> noise = process.draw_noise((1, 1, 1, 2), torch.Generator().manual_seed(0), x.device)
    >>> bound, vdm = process.bind(x, noise)[1], process.gaussian.bind(x, noise)[1]
    >>> t = torch.tensor([0.5])
    >>> torch.equal(bound.sample(x, t, noise), vdm.sample(x, t, noise))  # before training
    True
    """

    def __init__(self, data_channels: int = 1, width: int = 16, depth: int = 2, degree: int = 3) -> None:
        super().__init__(GaussianProcess.from_fields({}), ConvolutionalEncoder(data_channels, width, depth, degree))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> LearnedProcess:
        """See `ForwardProcess.from_fields`; what is not its own config is the VDM's.

        Raises:
            ConfigurationError: The schedule is a table of betas, whose reverse steps are DDPM's own.
        """
        form = fields.get("noise_schedule", "linear")
        if registry.parse_serialised("noise_schedules", form)[0] == "discrete_betas":
            raise ConfigurationError(
                "the learned process has reverse steps of its own, and a table of betas (discrete_betas) asks for "
                "DDPM's: give another noise_schedule, such as linear."
            )
        _, arguments = registry.resolve("forward_processes", fields["forward_process"])
        process = cls(**arguments)
        process.over(GaussianProcess.from_fields(fields, schedule))
        return process

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        assert isinstance(self.encoder, ConvolutionalEncoder)
        return dict(self.encoder.sizes)


class BoundEncoded(BoundProcess):
    """The process on one batch."""

    def __init__(self, process: EncodedProcess) -> None:
        self.process, self.encoder, self.gamma = process, process.encoder, process.gaussian.schedule
        self._vdm = process.gaussian.bind(None, {})[1]

    def mean(self, x: Tensor, gamma: Tensor) -> Tensor:
        """``m(x, t)`` where the schedule is at gamma, (B,) or ()."""
        return self.encoder(x, self._share(gamma)[0])

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        gamma = self.gamma(t)
        return marginal_sample(self.mean(x, gamma), gamma, noise["marginal"])

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        return self._vdm.predict(network, z_t, t)

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``1/2 expm1(gamma_t - gamma_s) e^{-gamma_t} |delta_t - (delta_t - delta_s)/c|^2``."""
        gamma_s, gamma_t = self.gamma(s), self.gamma(t)
        basis_s, basis_t = (self.encoder.basis(self._share(gamma)[0]) for gamma in (gamma_s, gamma_t))
        c = -torch.expm1(gamma_s - gamma_t).unsqueeze(-1)
        error = self._error(x, gamma_t, basis_t, basis_t - (basis_t - basis_s) / c, noise, network)
        return 0.5 * torch.expm1(gamma_t - gamma_s) * sum_dimensions(error**2)

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``e^{-gamma}/(2 gamma') |gamma' delta - d_t delta|^2``."""
        schedule_gradient = VarianceGradient(self.process.gaussian.schedule, self.gamma)
        gamma, gamma_prime = schedule_gradient(t)
        share, span = self._share(gamma)
        basis = self.encoder.basis(share)
        weights = basis - self.encoder.basis_slope(share) / span  # d_t u / gamma' = 1 / span
        rate = 0.5 * gamma_prime * sum_dimensions(self._error(x, gamma, basis, weights, noise, network) ** 2)
        return schedule_gradient.tell(rate, x[0].numel())

    def _error(
        self, x: Tensor, gamma: Tensor, basis: Tensor, weights: Tensor, noise: Noise, network: Network
    ) -> Tensor:
        """``e^{-gamma/2} (x - x_hat + sum_k w_k (f_k(x) - f_k(x_hat)))`` elementwise, z_t drawn with the basis there.

        ``x - x_hat`` is ``sigma (target - F) / d``: nothing large cancels.
        """
        target, level = self.process.gaussian.parameterization, broadcast(gamma, x)
        features = self.encoder.features(x)
        moved = combine(basis, features)
        z = marginal_sample(x + moved, gamma, noise["marginal"])
        output = self._output(network, z, gamma)
        a, b = target.coefficients(level)
        seen = noise["marginal"] + torch.exp(-0.5 * level) * moved  # (z - alpha x) / sigma
        off = sigma(level) * (target.target(x, seen, gamma) - output) / (a * sigma(level) - b * alpha(level))
        difference = features - self.encoder.features((x - off).to(x.dtype))
        return torch.exp(-0.5 * level) * (off + combine(weights, difference))

    def _output(self, network: Network, z: Tensor, gamma: Tensor) -> Tensor:
        """As `BoundProcess.predict`, at a gamma of each datum, (B,)."""
        gaussian, level = self.process.gaussian, broadcast(gamma, z)
        timestep = gaussian.conditioning(gamma).to(torch.promote_types(z.dtype, torch.float32))
        output = network((gaussian.parameterization.input_scale(level) * z).to(z.dtype), timestep).to(z.dtype)
        return (gaussian.parameterization.output_scale(level) * output).to(z.dtype)

    def prior_kl(self, x: Tensor) -> Tensor:
        """``KL(N(alpha_1 m(x, 1), sigma_1^2 I) || N(0, I))``."""
        gamma_1 = self.gamma(torch.ones(x.shape[0], dtype=x.dtype, device=x.device))
        return prior_kl(self.mean(x, gamma_1), gamma_1)

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        """VDM's, as m(x, 0) is x."""
        return self._vdm.reconstruction(levels, x, noise, network)

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        return self._vdm.prior_sample(shape, generator, device)

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        x_hat, kernel = self.reverse_kernel(output, z_t, s, t)
        eps = normal_noise(z_t.shape, generator, z_t.device, z_t.dtype)
        return kernel.sample(eps).to(z_t.dtype), x_hat.to(z_t.dtype)

    def reverse_kernel(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ReverseKernel]:
        x_hat = self.process.gaussian.x_hat(output, z_t, self.gamma(t)).to(z_t.dtype)
        return x_hat, self.posterior_kernel(x_hat, z_t, s, t)

    def marginal_kernel(self, x: Tensor, t: Tensor) -> ReverseKernel:
        gamma = self.gamma(t)
        level = broadcast(gamma, x)
        return ReverseKernel(alpha(level) * self.mean(x, gamma), sigma(level))

    def posterior_kernel(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseKernel:
        """``q(z_s|z_t, x)``: VDM's at x, its mean moved by ``alpha_s sum_k (b_k(s) - (1-c) b_k(t)) f_k(x)``."""
        gamma_s, gamma_t = self.gamma(s), self.gamma(t)
        basis_s, basis_t = (self.encoder.basis(self._share(gamma)[0]) for gamma in (gamma_s, gamma_t))
        weights = basis_s - torch.exp(gamma_s - gamma_t).unsqueeze(-1) * basis_t
        vdm = ReverseKernel.from_data(z_t, x, gamma_s, gamma_t)
        moved = alpha(broadcast(gamma_s, x)) * combine(weights, self.encoder.features(x))
        return ReverseKernel(vdm.mean + moved, vdm.scale)

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        return self._vdm.decode(z_0, network, generator)

    def _share(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``u = (gamma - gamma_0)/(gamma_1 - gamma_0)``, and ``gamma_1 - gamma_0``."""
        first, last = self.gamma(torch.arange(2, dtype=gamma.dtype, device=gamma.device)).to(gamma.dtype)
        return (gamma - first) / (last - first), last - first
