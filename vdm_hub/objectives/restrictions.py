r"""A variational diffusion model as the hierarchical VAE that it is.

Three restrictions turn a Markovian hierarchical VAE into a VDM (Luo, arXiv 2208.11970, section 3):

1. every latent has the data's shape;
2. the encoders are not learned but linear Gaussians, ``q(z_t|z_s) = N(alpha_ts z_s, sigma_ts^2 I)``;
3. the schedule brings the last latent to N(0, I), the hierarchy's own prior.

A VDM with T transitions has T + 1 latents, at times 0, 1/T, .., 1, so the hierarchy has depth T + 1.
`as_hierarchical_vae` builds it from the VDM's own parts; what is left to learn is the network behind the decoders.
Both models give the same ``log p(x, z) - log q(z|x)`` of the same latents, and so the same bound; the
denoising-matching form is its expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.decoders import FactorisedDecoder
from vdm_hub.diffusion.gaussian import sum_dimensions
from vdm_hub.diffusion.gaussian_process import GaussianProcess, scalar_gaussian
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.models.calls import CountedNetwork
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.objectives.hierarchical import HierarchicalObjective
from vdm_hub.objectives.variational_bound import Terms, VDMObjective


class LinearGaussianEncoder(nn.Module):
    """``q(z_t|z_s) = N(gain z_s, variance I)``, of which nothing is learned (VDM eq. 20 to 24).

    >>> mean, scale = LinearGaussianEncoder(torch.tensor(0.5), torch.tensor(4.0))(torch.ones(1, 2))
    >>> mean.tolist(), scale.tolist()
    ([[0.5, 0.5]], [[2.0, 2.0]])
    """

    gain: Tensor
    variance: Tensor

    def __init__(self, gain: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("variance", variance)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the scale at z."""
        mean = self.gain * z
        return mean, self.variance.sqrt().expand_as(mean)


class ReverseStep(nn.Module):
    """A VDM's ``p(z_s|z_t)``, the posterior ``q(z_s|z_t, x)`` at the network's estimate of x (VDM eq. 29 to 32)."""

    def __init__(self, objective: VDMObjective, s: float, t: float) -> None:
        super().__init__()
        self.objective, self.s, self.t = objective, s, t

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the scale of z_s at z = z_t."""
        process = scalar_gaussian(self.objective.process)
        gamma_s, gamma_t = process.schedule(z.new_tensor([self.s, self.t], dtype=torch.float64)).double()
        network = CountedNetwork(self.objective.network, {})
        kernel = process.bind(None, {})[1].predict_kernel(network, z, gamma_s, gamma_t)
        return kernel.mean, kernel.scale.expand_as(z)


class FactorisedLevels(nn.Module):
    """A VDM's ``p(x|z_0)`` as logits over the K levels: ``-1/2 exp(-gamma_0) (z_0/alpha_0 - x)^2`` (VDM eq. 6)."""

    def __init__(self, process: GaussianProcess) -> None:
        super().__init__()
        self.process = process

    def forward(self, z: Tensor) -> Tensor:
        """The logits at z_0, (B, C, H, W) -> (B, C, H, W, K)."""
        gamma = self.process.schedule(z.new_zeros((), dtype=torch.float64)).double()
        values = self.process.scaling.encode(torch.arange(self.process.num_levels, device=z.device), z.dtype)
        return -0.5 * torch.exp(-gamma) * ((z / gaussian.alpha(gamma)).unsqueeze(-1) - values) ** 2


def as_hierarchical_vae(
    objective: VDMObjective, image_shape: Sequence[int], times: Sequence[float] | None = None
) -> MarkovianHVAE:
    """The hierarchical VAE that a VDM is, of depth T + 1, from the VDM's own network and schedule.

    Its last latent is q's, of the schedule; its prior N(0, I), as in the VDM.

    Args:
        objective: The VDM, with a number of transitions T; Gaussian, with one gamma a time, and the decoder
            ``factorised``.
        image_shape: (C, H, W).
        times: Of its T + 1 latents, rising from 0 to 1; ``0, 1/T, .., 1`` where not given.

    Raises:
        ConfigurationError: It has no such form: continuous time, another process or decoder; or the times are others.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> unet = UNetVDMModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    >>> objective = VDMObjective(unet, VDMScheduler(num_levels=17).process, transitions=3)
    >>> as_hierarchical_vae(objective, (1, 8, 8)).depth
    4
    """
    process, transitions = scalar_gaussian(objective.process), objective.transitions
    if transitions is None:
        raise ConfigurationError(
            "continuous time has infinitely many latents: give the VDM a number of transitions to see it as a "
            "hierarchical VAE."
        )
    if not isinstance(process.decoder, FactorisedDecoder):
        raise ConfigurationError(
            f"p(x|z_0) is {type(process.decoder).__name__}, and only 'factorised' depends on z_0 alone, as a "
            f"hierarchical VAE's does on its first latent: choose that decoder."
        )
    times = [i / transitions for i in range(transitions + 1)] if times is None else list(times)
    if len(times) != transitions + 1 or sorted(set(times)) != times or (times[0], times[-1]) != (0, 1):
        raise ConfigurationError(
            f"times are {shortened(times)}: give {transitions + 1} of them, each above the one before, from 0 to 1."
        )
    with torch.no_grad():
        gammas = process.schedule(torch.tensor(times, dtype=torch.float64)).double()
    steps = [gaussian.transition(s, t) for s, t in pairwise(gammas)]
    encoders = [
        LinearGaussianEncoder(*step) for step in [(gaussian.alpha(gammas[0]), torch.sigmoid(gammas[0])), *steps]
    ]
    channels, height, width = image_shape
    return MarkovianHVAE(
        sample_size=(height, width),
        in_channels=channels,
        num_levels=process.num_levels,
        depth=transitions + 1,
        latent_shapes=[tuple(image_shape)],
        data_scaling=process.scaling.name,
        encoders=encoders,
        decoders=[ReverseStep(objective, s, t) for s, t in pairwise(times)],
        level_decoder=FactorisedLevels(process),
    )


class DenoisingHVAEObjective(HierarchicalObjective):
    r"""The denoising-matching form of a hierarchical VAE (Luo eq. 58), where its encoders are linear Gaussians.

    Then ``q(z_t|x)`` and ``q(z_{t-1}|z_t, x)`` are Gaussians in closed form, and each term has one random latent:
    ``reconstruction``, ``denoising_t = E KL(q(z_{t-1}|z_t, x) || p(z_{t-1}|z_t))`` for t = 2..T, ``prior``.

    Raises:
        ConfigurationError: An encoder is another: its posterior has no closed form.
    """

    def __init__(self, model: MarkovianHVAE) -> None:
        super().__init__(model)
        if not has_linear_encoders(model):
            raise ConfigurationError(
                "the denoising-matching form needs q(z_s|z_t, x) in closed form, which learned encoders do not have: "
                "use HVAEObjective, or the linear Gaussian encoders of vdm_hub.as_hierarchical_vae."
            )

    def terms(self, levels: Tensor, noise: Sequence[Tensor]) -> Terms:
        """The terms; ``noise`` of latent t draws it from ``q(z_t|x)`` directly."""
        model = self.model
        x = model.scale(levels, torch.float64)
        gain, variance = x.new_ones(()), x.new_zeros(())
        terms: Terms = {}
        for t, (encoder, eps) in enumerate(zip(model.encoders, noise, strict=True), 1):
            assert isinstance(encoder, LinearGaussianEncoder)
            before, spread = gain, variance  # of q(z_{t-1}|x)
            gain = encoder.gain * before
            variance = encoder.gain**2 * spread + encoder.variance
            z = gain * x + variance.sqrt() * eps.double()
            if t == 1:
                terms["reconstruction"] = -model.log_likelihood(levels, z)
                continue
            precision = encoder.gain**2 / encoder.variance + 1 / spread
            mean = (encoder.gain / encoder.variance * z + before / spread * x) / precision
            p = model.decode(t - 1, z)
            q = ReverseKernel(mean, precision.rsqrt())
            terms[f"denoising_{t}"] = q.kl(ReverseKernel(p.mean.double(), p.scale.double()))
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        prior = gaussian.kl_divergence(gain * x, variance.expand_as(x), zero, one)
        return terms | {"prior": sum_dimensions(prior)}


def has_linear_encoders(model: MarkovianHVAE) -> bool:
    """Whether every encoder is a linear Gaussian."""
    return all(isinstance(encoder, LinearGaussianEncoder) for encoder in model.encoders)
