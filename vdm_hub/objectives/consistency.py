r"""The bound in its consistency form, and how much more noise it has than the denoising-matching form.

With latents ``z_0..z_T`` (Luo's ``x_1..x_{T+1}``) and ``z_{-1} = x``, Luo eq. 44 reads, as a bound on ``-log p(x)``,

    E[-log p(x|z_0)] + E_{q(z_{T-1}|x)} KL(q(z_T|z_{T-1}) || p(z_T))
        + sum_{i=0}^{T-1} E_{q(z_{i-1}, z_i, z_{i+1}|x)}[log q(z_i|z_{i-1}) - log p(z_i|z_{i+1})].

Its total is that of the denoising-matching form (Luo eq. 58; VDM eq. 11 to 13); its terms are not, and each needs two
random steps, ``z_i`` from ``z_{i-1}`` and ``z_{i+1}`` from ``z_i``. What is printed as Luo eq. 45, an expectation of
``KL(q(z_i|z_{i-1}) || p(z_i|z_{i+1}))`` over ``q(z_{i-1}, z_{i+1}|x)``, is another number: inside of the KL it draws
``z_i`` from ``z_{i-1}`` alone, independent of ``z_{i+1}``, though ``z_{i+1}`` was made from it. Only eq. 44 is
computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.forward_process import ForwardProcess, Noise
from vdm_hub.diffusion.gaussian import broadcast, sum_dimensions
from vdm_hub.diffusion.gaussian_process import BoundGaussian, scalar_gaussian
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.diffusion.times import discretise
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.calls import CountedNetwork
from vdm_hub.objectives.variational_bound import Batch, Bound, Terms, VDMObjective, bind_batch

_STEPS = ("previous", "current", "next", "last")


class ConsistencyObjective(VDMObjective):
    """The bound of `VDMObjective` by its other decomposition: terms ``reconstruction``, ``prior``, ``consistency``.

    It takes the place of a `VDMObjective` wherever the bound is estimated; it is not one to train on.

    Args:
        network: See `VDMObjective`.
        process: Gaussian, with one gamma per time, of the data or of their latents.
        transitions: T, any whole number; continuous time has no such form.

    Raises:
        ConfigurationError: There is no T, or the process is another.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> unet = UNetVDMModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    >>> objective = ConsistencyObjective(unet, VDMScheduler(num_levels=17).process, transitions=4)
    >>> batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long)}
    >>> noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
    >>> list(objective(batch, torch.tensor([0.25, 0.75]), noise).terms)
    ['reconstruction', 'prior', 'consistency']
    """

    integrand = "consistency"

    def __init__(self, network: nn.Module, process: ForwardProcess, transitions: int | None) -> None:
        if transitions is None:
            raise ConfigurationError(
                "the consistency form of the bound is a sum over transitions, and continuous time has none: give a "
                "number of transitions."
            )
        scalar_gaussian(process.diffused)
        super().__init__(network, process, transitions)

    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        """The terms, each per datum, (B,), in nats; ``consistency`` is T times that of each datum's transition."""
        assert self.transitions is not None
        levels, network = batch["levels"], CountedNetwork(self.network, batch)
        with torch.autocast(levels.device.type, enabled=False):
            x = self.process.encode(levels)
            extras, bound = bind_batch(self.process, batch, x, noise)
            s, t = discretise(times.double(), self.transitions)
            origin = bound.origin(x)
            # Of data, not what float32 kept of them: 17 levels do not lie on its grid.
            origin = scalar_gaussian(self.process).encode(levels, torch.float64) if origin is x else origin.double()
            terms = {
                "reconstruction": bound.reconstruction(levels, x, noise, network),
                "prior": self._prior(origin, noise["last"].double()),
                "consistency": self.transitions * self._consistency(origin, s, t, noise, network),
            }
        return Bound(terms | extras, dimensions=levels[0].numel())

    def network_terms(self, batch: Batch, times: Tensor, noise: Noise, *, reconstruction: bool) -> Terms:
        """The terms that the network has a say in: see `VDMObjective.network_terms`."""
        names = ("reconstruction", self.integrand) if reconstruction else (self.integrand,)
        terms = self(batch, times, noise).terms
        return {name: terms[name] for name in names}

    def _prior(self, x: Tensor, eps: Tensor) -> Tensor:
        """``KL(q(z_T|z_{T-1}) || N(0, I))`` at one draw of ``z_{T-1}``."""
        assert self.transitions is not None
        schedule = scalar_gaussian(self.process.diffused).schedule
        ends = torch.tensor([1 - 1 / self.transitions, 1.0], dtype=torch.float64, device=x.device)
        gamma_s, gamma_t = schedule(ends).double()
        gain, variance = gaussian.transition(gamma_s, gamma_t)
        mean = gain * gaussian.marginal_sample(x, gamma_s, eps)
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        return sum_dimensions(gaussian.kl_divergence(mean, variance.expand_as(mean), zero, one))

    def _consistency(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: CountedNetwork) -> Tensor:
        """``log q(z_s|z_r) - log p(z_s|z_t)`` on one draw of all three, r one step before s, or x itself at s = 0."""
        assert self.transitions is not None
        process = scalar_gaussian(self.process.diffused)
        gamma_s, gamma_t = process.schedule(s).double(), process.schedule(t).double()
        gamma_r = process.schedule((s - 1 / self.transitions).clamp(min=0)).double()
        gain, variance = (
            broadcast(torch.where(s > 0, later, first), x)
            for later, first in zip(
                gaussian.transition(gamma_r, gamma_s),
                (gaussian.alpha(gamma_s), torch.sigmoid(gamma_s)),
                strict=True,
            )
        )
        origin = torch.where(broadcast(s > 0, x), gaussian.marginal_sample(x, gamma_r, noise["previous"].double()), x)
        q = ReverseKernel(gain * origin, variance.sqrt())
        z_s = q.sample(noise["current"].double())
        step, step_variance = (broadcast(value, x) for value in gaussian.transition(gamma_s, gamma_t))
        z_t = step * z_s + step_variance.sqrt() * noise["next"].double()
        p = BoundGaussian(process, process.schedule).predict_kernel(network, z_t, gamma_s, gamma_t)
        return q.log_prob(z_s) - p.log_prob(z_s)

    def draw_noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The noise of `VDMObjective`, and that of the steps of a chain."""
        levels = batch["levels"]
        shape = self.process.latent_shape(levels.shape)
        steps = {name: normal_noise(shape, generator, levels.device) for name in _STEPS}
        return super().draw_noise(batch, generator) | steps
