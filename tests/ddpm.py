"""A DDPM trained with diffusers' own classes, and the terms of Ho et al. written out apart from the library."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from tiny import quiet, seeded
from vdm_hub.data.loading import load_split
from vdm_hub.objectives.variational_bound import VDMObjective

K, T = 17, 20
BETAS = {"num_train_timesteps": T, "beta_start": 0.005, "beta_end": 0.5}


def new_network(outputs: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=outputs,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@functools.cache
def trained_ddpm() -> DDPMPipeline:
    """As diffusers' own example of training does it: noise, `add_noise`, the mean squared error of the noise."""
    levels = load_split("digits", "train", num_levels=K).levels
    unet, scheduler, generator = new_network(), DDPMScheduler(**BETAS), seeded(1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(150):
        images = 2 * levels[torch.randint(len(levels), (32,), generator=generator)].float() / (K - 1) - 1
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(T, (len(images),), generator=generator)
        predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        optimizer.zero_grad()
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
    return quiet(DDPMPipeline(unet.eval(), scheduler))


def digits_levels() -> Tensor:
    return load_split("digits", "test[:40]", num_levels=K).levels.long()


def with_variance(trained: DDPMPipeline, variance: str, **changes: Any) -> DDPMPipeline:
    """The trained network under another variance; where that is learned, with channels that say it."""
    unet = trained.unet
    if variance.startswith("learned"):
        unet = new_network(outputs=2).eval()
        state = {name: value for name, value in trained.unet.state_dict().items() if "conv_out" not in name}
        unet.load_state_dict(state, strict=False)
        with torch.no_grad():
            unet.conv_out.weight[:1] = trained.unet.conv_out.weight
            unet.conv_out.bias.copy_(torch.tensor([float(trained.unet.conv_out.bias), 0.1]))
            unet.conv_out.weight[1] *= 0.02 if variance == "learned" else 1.0  # a variance itself must be positive
    scheduler = DDPMScheduler.from_config(trained.scheduler.config, variance_type=variance, **changes)
    return quiet(DDPMPipeline(unet, scheduler))


@torch.no_grad()
def ho_et_al(
    unet: Any,
    betas: Tensor,
    levels: Tensor,
    eps: Tensor,
    eps_1: Tensor,
    variance: str = "fixed_small",
    clipped: bool = False,
) -> dict[str, Tensor]:
    """The terms of Ho et al. (arXiv 2006.11239) eq. 5 per image in nats, with the same noise in each L_{t-1}, t > 1.

    Written out with their t = 1..T, of which diffusers tells the network t - 1. Their variance is beta_tilde or beta
    (section 3.2); learned ones are those of Nichol & Dhariwal (arXiv 2102.09672, eq. 15) and of diffusers.
    """
    beta = torch.cat([torch.zeros(1), betas]).double()  # beta[t]
    alpha = 1 - beta
    bar = alpha.cumprod(0)
    x_0 = 2 * levels.double() / (K - 1) - 1
    beta_tilde = torch.tensor([0.0, 0.0, *((1 - bar[t - 1]) / (1 - bar[t]) * beta[t] for t in range(2, T + 1))])

    def posterior_mean(data: Tensor, x_t: Tensor, t: int) -> Tensor:  # eq. 7
        from_data = bar[t - 1].sqrt() * beta[t] / (1 - bar[t]) * data
        return from_data + alpha[t].sqrt() * (1 - bar[t - 1]) / (1 - bar[t]) * x_t

    def reverse(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:  # mu_theta, eq. 11, and sigma_t^2
        output = unet(x_t.float(), torch.full((len(x_t),), t - 1)).sample.double()
        predicted, raw = output[:, :1], output[:, 1:]
        mean = (x_t - beta[t] / (1 - bar[t]).sqrt() * predicted) / alpha[t].sqrt()
        if clipped:
            data = (x_t - (1 - bar[t]).sqrt() * predicted) / bar[t].sqrt()
            mean = posterior_mean(data.clamp(-1, 1), x_t, t)
        small = beta_tilde[max(t, 2)]
        if variance == "learned_range":
            v = (raw + 1) / 2
            return mean, (v * beta[t].log() + (1 - v) * small.log()).exp()
        if variance == "learned":
            return mean, raw
        return mean, beta[t] if variance == "fixed_large" and t > 1 else small  # sigma_1 as in their code

    def per_image(values: Tensor) -> Tensor:
        return values.flatten(1).sum(1)

    def diffused(t: int, noise: Tensor) -> Tensor:  # eq. 4
        return bar[t].sqrt() * x_0 + (1 - bar[t]).sqrt() * noise.double()

    last = 1 - bar[T]  # L_T: KL(q(x_T|x_0) || N(0, I))
    prior = per_image(0.5 * (last + bar[T] * x_0**2 - 1 - last.log()))
    diffusion = torch.zeros(len(levels), dtype=torch.float64)
    for t in range(2, T + 1):  # L_{t-1}, eq. 8, with the posterior of eq. 7
        x_t = diffused(t, eps)
        mean, sigma_2 = reverse(x_t, t)
        squares = beta_tilde[t] + (posterior_mean(x_0, x_t, t) - mean) ** 2
        diffusion += per_image(0.5 * ((sigma_2 / beta_tilde[t]).log() + squares / sigma_2 - 1 + 0 * x_0))
    # L_0, eq. 13, with 1/255 for their 256 levels.
    mean, sigma_2 = reverse(diffused(1, eps_1), 1)
    normal = torch.distributions.Normal(mean, sigma_2.sqrt())
    upper = torch.where(levels == K - 1, 1.0, normal.cdf(x_0 + 1 / (K - 1)))
    lower = torch.where(levels == 0, 0.0, normal.cdf(x_0 - 1 / (K - 1)))
    return {"reconstruction": -per_image((upper - lower).log()), "prior": prior, "diffusion": diffusion}


def transitions_summed(objective: VDMObjective, levels: Tensor, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library's bound with each of the T - 1 transitions visited once, in nats."""
    summed = torch.zeros(len(levels), dtype=torch.float64)
    with torch.no_grad():
        for i in range(T - 1):
            bound = objective({"levels": levels}, torch.full((len(levels),), (i + 0.5) / (T - 1)), noise)
            summed += bound.terms["diffusion"].double() / (T - 1)
    return {name: term.double() for name, term in bound.terms.items()} | {"diffusion": summed}
