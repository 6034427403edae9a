"""A model's twin for readers who have diffusers alone: the same network under a stock pipeline and scheduler.

The twin is a `DDPMPipeline` of the model's `UNet2DModel` and a `DDPMScheduler` whose betas are those noise levels that
the network reads as the timesteps 0..T-1. What remains different is measured by `twin_error`, for the model card.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor

from vdm_hub.data.levels import images_from_levels
from vdm_hub.diffusion.draws import normal_noise
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.errors import ConfigurationError
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.schedulers.configs import DDPM_KEYS, derived_betas
from vdm_hub.schedulers.vdm import VDMScheduler, time_tensor

# VDM's process in DDPM's words. The variance of its reverse step is the posterior's; it clips nothing; and only
# "trailing" starts at the noisiest level, where the prior is, and ends within one step of the cleanest.
_VDM_IN_DDPM = {"variance_type": "fixed_small", "clip_sample": False, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class TwinError:
    """The distance of a stock twin from the exact process of its model.

    Both were given the same noise: the first latent, and the draw of each step. Their steps lie at the same timesteps,
    those of the twin; called by themselves, they agree on these only where gamma is linear in t. Pixels are in [0, 1].

    Attributes:
        gamma: The largest difference of gamma = -log SNR, over the T noise levels of the twin's table, from the levels
            that the network reads as those timesteps. It is what float32 betas cannot hold.
        pixels: Root mean square difference of the pixels of the finished images, as each pipeline returns them. It
            holds all of the below.
        estimates: The same of what the network takes for the data in the last step, before either pipeline makes an
            image of it: the part of ``pixels`` that is the process's own.
        means: Difference of the mean over all pixels of all finished images, without its sign.
        scaling: The largest distance between a level as this library shows it, ``i/(K-1)``, and as the twin shows it,
            which takes the data for values from -1 to 1: ``1/(2K)`` for data scaled to bin centers, else 0.
        level: The distance between two of the K levels, ``1/(K-1)``: the ruler for all of these.
        num_images: How many images were drawn with each.
        num_inference_steps: Evaluations of the network for each of them.
        seed: Image i was drawn from ``seed + i``.
    """

    gamma: float
    pixels: float
    estimates: float
    means: float
    scaling: float
    level: float
    num_images: int
    num_inference_steps: int
    seed: int

    def to_dict(self) -> dict[str, float | int]:
        """The figures as one JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        """The sentence for the model card."""
        rest = "rounding to levels"
        if self.estimates > 0:
            rest = "the last step, the decoder's draw of levels"
        if self.scaling > 0:
            rest += f", and the scale of the pixels (up to {self.scaling:.2g})"
        levels = "are this model's" if self.gamma < 1e-9 else f"differ from this model's by at most {self.gamma:.2g}"
        return (
            f"Its noise levels {levels} in log-SNR, and {self.num_images} "
            f"images drawn in {self.num_inference_steps} steps from the same noise at the same timesteps differ by "
            f"{self.pixels:.2g} (root mean square, pixels in [0, 1], where two levels lie {self.level:.2g} apart): "
            f"the process itself makes {self.estimates:.2g} of it, and the rest is {rest}."
        )


def build_stock_twin(pipeline: VDMPipeline) -> DDPMPipeline:
    """The twin of a pipeline, sharing its network; ``save_pretrained`` writes what diffusers alone can load.

    A DDPM-family process goes out as it is, bit for bit. Any other becomes the table of betas behind the timesteps
    0..T-1 of its network, with DDPM's last step, which goes to the estimate of the data where a VDM draws z_0 and then
    levels from ``p(x|z_0)``.

    Raises:
        ConfigurationError: There is no twin; the message says why.

    Example:
        >>> from vdm_hub import UNetVDMModel
        >>> build_stock_twin(VDMPipeline(UNetVDMModel(block_out_channels=(32,)), VDMScheduler()))
        Traceback (most recent call last):
        vdm_hub.errors.ConfigurationError: the network is a UNetVDMModel, which diffusers alone does not have; only a
        model with a UNet2DModel has a stock twin.
    """
    _check_network(pipeline.unet)
    scheduler = _own_scheduler(pipeline)
    scheduler.check_stock_process()
    config = scheduler.config
    if scheduler.ends_at_data:
        if config.conditioning != "table":
            raise ConfigurationError(
                "the network reads its noise level through another map than its table of betas, so no stock sampler "
                "tells it the right timesteps: this model has no stock twin."
            )
        arguments = {key: config[key] for key in DDPM_KEYS}
    else:
        betas = derived_betas(pipeline.process)
        table = {"num_train_timesteps": config.num_train_timesteps, "trained_betas": betas}
        arguments = table | _VDM_IN_DDPM | {"prediction_type": config.prediction_type}
    stock = DDPMScheduler(**arguments)
    if bool((stock.alphas_cumprod == 1).any()):
        raise ConfigurationError(
            "the process begins with so little noise that diffusers' float32 tables can't tell it from none, and a "
            "step there would be 0 / 0: this model has no stock twin."
        )
    return DDPMPipeline(pipeline.unet, stock)


def _check_network(network: Any) -> None:
    if type(network) is DiTTransformer2DModel:
        raise ConfigurationError(
            "the network is a DiTTransformer2DModel, which diffusers samples in a DiTPipeline: that decodes latents "
            "of an AutoencoderKL and knows no levels, so it runs another process: this model has no stock twin."
        )
    if type(network) is not UNet2DModel:
        name = type(network).__name__
        is_stock = type(network).__module__.startswith("diffusers.")
        why = "samples in other pipelines" if is_stock else "does not have"
        raise ConfigurationError(
            f"the network is a {name}, which diffusers alone {why}; only a model with a UNet2DModel has a stock twin."
        )
    if network.config.sample_size is None:
        raise ConfigurationError("the network's config has no sample_size, which a DDPMPipeline needs: give it there.")
    if network.class_embedding is not None:
        raise ConfigurationError(
            "the network is conditioned on classes, and diffusers has no pipeline that gives them to a UNet2DModel: "
            "this model has no stock twin."
        )


def _own_scheduler(pipeline: VDMPipeline) -> VDMScheduler:
    """The scheduler of the pipeline's process, whichever sampler is in place."""
    scheduler: VDMScheduler = VDMScheduler.from_config(pipeline.scheduler.config)
    return scheduler


# ---- its error ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def twin_error(
    pipeline: VDMPipeline, twin: DDPMPipeline, num_images: int = 64, num_inference_steps: int = 250, seed: int = 0
) -> TwinError:
    """Measure a twin against the exact process; see `TwinError` for what each number is.

    Args:
        pipeline: The model, in float32.
        twin: What `build_stock_twin` made of it.
        num_images: How many images to draw with each, all at once.
        num_inference_steps: Evaluations of the network for each of them.
        seed: Image i is drawn from ``seed + i``.

    Raises:
        ConfigurationError: The network is in half precision, or one of the two samples what is not finite.
    """
    process = pipeline.process
    if not isinstance(process, GaussianProcess) or pipeline.unet.dtype != torch.float32:
        raise ConfigurationError("a twin's error is measured on a Gaussian process and a network in float32.")
    own_estimate, own_images = _own_samples(pipeline, twin, num_inference_steps, _generators(num_images, seed))
    twin_estimate, twin_images = _twin_samples(pipeline, twin, num_inference_steps, _generators(num_images, seed))
    shown = (process.encode(torch.arange(process.num_levels)) / 2 + 0.5).clamp(0, 1)
    error = TwinError(
        gamma=_gamma_error(process, twin.scheduler),
        pixels=_root_mean_square(twin_images - own_images),
        estimates=_root_mean_square((twin_estimate - own_estimate) / 2),
        means=abs(float(twin_images.double().mean() - own_images.double().mean())),
        scaling=float((shown - torch.linspace(0, 1, process.num_levels)).abs().max()),
        level=1 / (process.num_levels - 1),
        num_images=num_images,
        num_inference_steps=num_inference_steps,
        seed=seed,
    )
    if not all(math.isfinite(value) for value in error.to_dict().values()):
        raise ConfigurationError("samples of the model or of its twin are not finite: look at the model's weights.")
    return error


def _gamma_error(process: GaussianProcess, stock: DDPMScheduler) -> float:
    """The error of gamma, from diffusers' alpha-bar in float32; a last SNR of zero has no gamma to compare."""
    alpha_bar = stock.alphas_cumprod.double()
    exact = process.conditioning.inverse(torch.arange(len(alpha_bar), dtype=torch.float64))
    error = torch.log1p(-alpha_bar) - torch.log(alpha_bar) - exact
    return float(error[alpha_bar > 0].abs().max())


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _generators(num_images: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(num_images)]


def _twin_samples(
    pipeline: VDMPipeline, twin: DDPMPipeline, steps: int, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """``(estimate of the data, images in [0, 1])`` by the steps of `DDPMPipeline`, which returns only the latter."""
    twin.scheduler.set_timesteps(steps)
    z = normal_noise((len(generators), *pipeline.image_shape), generators, pipeline._execution_device)
    for timestep in twin.scheduler.timesteps:
        z = twin.scheduler.step(twin.unet(z, timestep).sample, timestep, z, generator=generators).prev_sample
    return z, (z / 2 + 0.5).clamp(0, 1)  # its last step leaves the network's estimate


def _own_samples(
    pipeline: VDMPipeline, twin: DDPMPipeline, steps: int, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """``(estimate of the data, images in [0, 1])`` of the exact process, at the twin's timesteps."""
    scheduler, process = _own_scheduler(pipeline), pipeline.process
    if scheduler.ends_at_data:
        exact = VDMPipeline(pipeline.unet, scheduler)
        exact.set_progress_bar_config(disable=True)
        estimate = exact(len(generators), generators, steps, output_type="latent", return_dict=False)[0]
        return estimate, images_from_levels(process.quantise(estimate), process.num_levels)
    twin.scheduler.set_timesteps(steps)
    times = process.time(twin.scheduler.timesteps.double()).tolist()
    estimate, levels = _chain(pipeline, [1.0, *times[1:], 0.0], generators)  # the prior is at 1, wherever tau(1) lies
    return estimate, images_from_levels(levels, process.num_levels)


def _chain(pipeline: VDMPipeline, times: list[float], generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """`VDMPipeline`'s steps through descending times, ``(estimate of the data, levels)``.

    A step of no length, at a timestep beyond the process's own, changes nothing; it draws, so that pairs stay pairs.
    """
    process = pipeline.process
    _, bound = process.bind(None, {})
    network = pipeline._network(process, {})
    z = bound.prior_sample((len(generators), *pipeline.image_shape), generators, pipeline._execution_device)
    estimate = z
    for first, second in itertools.pairwise(times):
        t, s = time_tensor(first, z), time_tensor(second, z)
        z, estimate = bound.reverse_step(bound.predict(network, z, t), z, s, t, generators)
    return estimate, bound.decode(z, network, generators)
