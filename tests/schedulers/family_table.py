"""The families of diffusers' checkpoints: Gaussian data with their exact network, in each family's own convention.

``python tests/schedulers/family_table.py`` writes the table of docs/likelihoods.md.

The networks are written out with what diffusers' schedulers say of them, and not with this library's targets.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

PLACES = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
sys.path[:0] = [place for place in PLACES if place not in sys.path]

from vdm_hub import LatentVDMPipeline, VDMPipeline  # noqa: E402
from vdm_hub.diffusion.gaussian_process import GaussianProcess  # noqa: E402
from vdm_hub.diffusion.latent_process import LatentProcess  # noqa: E402
from vdm_hub.likelihood.probability_flow import flow_density  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "likelihoods.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
MEAN, DEVIATION = 0.3, 0.8  # of each pixel by itself
SIZE = 2


class GaussianNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The exact network of pixels from ``N(mean, deviation^2)``, as a checkpoint of a family has it."""

    @register_to_config
    def __init__(
        self,
        convention: str,
        mean: float = MEAN,
        deviation: float = DEVIATION,
        sample_size: int = SIZE,
        in_channels: int = 3,
        out_channels: int = 3,
        steps: int = 1000,
    ) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        told = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, *(1,) * (sample.ndim - 1))
        output = CONVENTIONS[self.config.convention](sample.double(), told, self.config).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def flow(read: Tensor, told: Tensor, about: Any) -> Tensor:
    """`FlowMatchEulerDiscreteScheduler.scale_noise`: ``u eps + (1 - u) x``; its step follows ``eps - x``."""
    u, variance = told / about.steps, about.deviation**2
    away = (read - (1 - u) * about.mean) / ((1 - u) ** 2 * variance + u**2)
    return u * away - (about.mean + (1 - u) * variance * away)


def edm(read: Tensor, told: Tensor, about: Any, sign: float = 1.0, sigma_data: float = 0.5) -> Tensor:
    """`EDMEulerScheduler.precondition_inputs`, ``_noise`` and ``_outputs``."""
    s = torch.exp(4 * told)
    y = read * (s**2 + sigma_data**2).sqrt()
    skip = sigma_data**2 / (s**2 + sigma_data**2)
    return (denoised(y, s, about) - skip * y) / (sign * s * sigma_data / (s**2 + sigma_data**2).sqrt())


def euler(read: Tensor, told: Tensor, about: Any) -> Tensor:
    """`EulerDiscreteScheduler` with continuous timesteps: ``x = y/(s^2 + 1) - s/sqrt(s^2 + 1) F``."""
    s = torch.exp(4 * told)
    y = read * (s**2 + 1).sqrt()
    return (y / (s**2 + 1) - denoised(y, s, about)) * (s**2 + 1).sqrt() / s


def score(read: Tensor, told: Tensor, about: Any) -> Tensor:
    """`ScoreSdeVeScheduler`: ``grad log q(x + s eps)``, told s."""
    return -(read - about.mean) / (about.deviation**2 + told**2)


def velocity(read: Tensor, told: Tensor, about: Any) -> Tensor:
    """`DDPMScheduler.get_velocity` on a table that ends at an SNR of zero: told its index."""
    bar = zero_snr().alphas_cumprod.double()
    gamma = torch.log1p(-bar) - torch.log(bar.clamp(min=2.0**-24))
    low = told.floor().clamp(max=about.steps - 2).long()
    at = gamma[low] + (told - low) * (gamma[low + 1] - gamma[low])
    alpha, sigma = torch.sigmoid(-at).sqrt(), torch.sigmoid(at).sqrt()
    away = (read - alpha * about.mean) / (alpha**2 * about.deviation**2 + sigma**2)
    return alpha * sigma * away - sigma * (about.mean + alpha * about.deviation**2 * away)


def denoised(y: Tensor, s: Tensor, about: Any) -> Tensor:
    """``E[x|y]``, ``y = x + s eps``."""
    return (about.deviation**2 * y + s**2 * about.mean) / (about.deviation**2 + s**2)


def zero_snr() -> Any:
    return diffusers.DDPMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )


CONVENTIONS: dict[str, Callable[..., Tensor]] = {
    "flow": flow,
    "edm": edm,
    "edm_v": lambda read, told, about: edm(read, told, about, sign=-1.0),
    "euler": euler,
    "score": score,
    "velocity": velocity,
}


@dataclass(frozen=True)
class Case:
    """A family: a scheduler of it, how its network reads the noise, and what a reader must say."""

    family: str
    taken_over: str
    scheduler: Callable[[], Any]
    convention: str
    said: dict[str, Any] = field(default_factory=dict)
    pipeline: str = "DDPMPipeline"
    mean: float = MEAN
    deviation: float = DEVIATION

    def stock(self, sample_size: int = SIZE) -> Any:
        """A stock pipeline of it."""
        network = GaussianNetwork(self.convention, self.mean, self.deviation, sample_size)
        made = getattr(diffusers, self.pipeline)(unet=network.eval(), scheduler=self.scheduler())
        made.set_progress_bar_config(disable=True)
        return made

    def pipe(self, sample_size: int = SIZE) -> VDMPipeline:
        """The same as a VDM."""
        pipe = VDMPipeline.from_diffusers(self.stock(sample_size), **self.said)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@dataclass(frozen=True)
class LatentCase(Case):
    """A pipeline of latents, whose exact network is that of latents from ``N(mean, deviation^2)``."""

    mean: float = 0.05
    deviation: float = 0.3

    def stock(self, sample_size: int = SIZE) -> Any:
        shape = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "latent_channels": 2}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        kind, role, part = LATENT_PARTS[self.pipeline]
        torch.manual_seed(0)
        autoencoder = getattr(diffusers, kind)(**shape, **blocks, norm_num_groups=4).eval()
        network = GaussianNetwork(self.convention, self.mean, self.deviation, sample_size, 2, 2).eval()
        return getattr(diffusers, self.pipeline)(**{part: network, role: autoencoder, "scheduler": self.scheduler()})

    def pipe(self, sample_size: int = SIZE) -> LatentVDMPipeline:
        pipe = LatentVDMPipeline.from_diffusers(self.stock(sample_size), **self.said)
        pipe.set_progress_bar_config(disable=True)
        pipe.fit_first_stage(self.levels(16, pipe, seed=2))
        return pipe

    def levels(self, count: int, pipe: VDMPipeline, seed: int) -> Tensor:
        """Images of one grey level each, and some noise."""
        generator = torch.Generator().manual_seed(seed)
        grey = torch.randint(40, 210, (count, 1, 1, 1), generator=generator)
        return grey + torch.randint(-20, 20, (count, *pipe.image_shape), generator=generator)


LATENT_PARTS = {"DiTPipeline": ("AutoencoderKL", "vae", "transformer"), "LDMPipeline": ("VQModel", "vqvae", "unet")}
_ENDS = "network, target, ends of the noise"
_ALL = {"num_levels": 256, "data_scaling": "full", "decoder": "factorised"}
_IN_UNIT = {"mean": 0.5 + MEAN / 2, "deviation": DEVIATION / 2}
CASES = {
    "FlowMatchEulerDiscreteScheduler": Case(
        "flow matching", _ENDS, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "flow", _ALL
    ),
    "FlowMatchHeunDiscreteScheduler": Case(
        "flow matching", _ENDS, diffusers.FlowMatchHeunDiscreteScheduler, "flow", _ALL
    ),
    "UniPCMultistepScheduler, use_flow_sigmas": Case(
        "flow matching",
        _ENDS,
        lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "flow",
        _ALL,
    ),
    "EDMEulerScheduler": Case("EDM", _ENDS, diffusers.EDMEulerScheduler, "edm", _ALL),
    "EDMDPMSolverMultistepScheduler, v_prediction": Case(
        "EDM", _ENDS, lambda: diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"), "edm_v", _ALL
    ),
    "EulerDiscreteScheduler, continuous timesteps": Case(
        "Euler with sigmas",
        _ENDS,
        lambda: diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
        ),
        "euler",
        _ALL,
    ),
    "ScoreSdeVeScheduler": Case(
        "VE",
        _ENDS,
        lambda: diffusers.ScoreSdeVeScheduler(sigma_max=50.0),
        "score",
        _ALL | {"data_scaling": "unit"},
        "ScoreSdeVePipeline",
        **_IN_UNIT,
    ),
    "KarrasVeScheduler": Case(
        "VE by Karras",
        "the same, and data scaling",
        diffusers.KarrasVeScheduler,
        "score",
        {"num_levels": 256, "decoder": "factorised"},
        "KarrasVePipeline",
        **_IN_UNIT,
    ),
    "DDPMScheduler, rescale_betas_zero_snr": Case("DDPM, zero terminal SNR", "all", zero_snr, "velocity"),
}

LATENT_CASES: dict[str, Case] = {
    "DiTPipeline, DDIMScheduler": LatentCase(
        "latents, of betas",
        "all; the autoencoder's scale is fitted",
        lambda: diffusers.DDIMScheduler.from_config(zero_snr().config),
        "velocity",
        pipeline="DiTPipeline",
    ),
    "LDMPipeline, FlowMatchEulerDiscreteScheduler": LatentCase(
        "latents, of flow matching",
        f"{_ENDS}; the autoencoder's scale is fitted",
        diffusers.FlowMatchEulerDiscreteScheduler,
        "flow",
        {"num_levels": 256},
        "LDMPipeline",
    ),
}
ALL = CASES | LATENT_CASES


# ---- the oracles ----------------------------------------------------------------------------------------------------


def density_error(case: Case) -> float:
    """The largest error of ``log p_0(z_0)`` by the ODE, in nats, against the flow of a Gaussian in closed form."""
    pipe = case.pipe()
    process = pipe.process.diffused
    assert isinstance(process, GaussianProcess)
    bound, ends = process.bind(None, {})[1], process.schedule.endpoints()
    alpha, variance = (value for value in zip(*(_moments(gamma, case.deviation) for gamma in ends), strict=True))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, pipe.unet.config.in_channels, SIZE, SIZE, generator=generator, dtype=torch.float64) * math.sqrt(
        variance[0]
    )
    network = pipe.unet.double()
    found = flow_density(
        bound, lambda sample, told: network(sample, told, return_dict=False)[0], z + alpha[0] * case.mean, None, 1e-8
    )
    z_1 = alpha[1] * case.mean + z * math.sqrt(variance[1] / variance[0])
    log_p = -0.5 * (z_1**2 + math.log(2 * math.pi)).flatten(1).sum(1) + z[0].numel() / 2 * math.log(
        variance[1] / variance[0]
    )
    return float((found.log_density - log_p).abs().max())


def _moments(gamma: float, deviation: float) -> tuple[float, float]:
    """alpha, and the variance of z, at a log-SNR of -gamma."""
    shares = 1 / (1 + math.exp(gamma)), 1 / (1 + math.exp(-gamma))
    return math.sqrt(shares[0]), shares[0] * deviation**2 + shares[1]


def exact_diffusion_term(x: Tensor, ends: tuple[float, float], case: Case, spread: Tensor | float = 0.0) -> Tensor:
    r"""The diffusion term of data x, nats, (B,): ``1/2 int (r s^4 + (x - mu)^2)/(1 + r s^2)^2 dr`` over the SNR r.

    Of data that are draws around x its mean over them: ``spread`` is their variance.
    """
    v, away = case.deviation**2, (x - case.mean) ** 2 + spread

    def primitive(gamma: float) -> Tensor:
        r = math.exp(-gamma)
        return math.log1p(r * v) + 1 / (1 + r * v) - away / (v * (1 + r * v))

    return 0.5 * (primitive(ends[0]) - primitive(ends[1])).flatten(1).sum(1)


def bound_error(case: Case) -> tuple[float, float]:
    """The reported diffusion term less the closed form, and the standard error of the bound, both in bits/dim."""
    pipe, spread = case.pipe(sample_size=4), torch.zeros(())
    process, diffused = pipe.process, pipe.process.diffused
    assert isinstance(diffused, GaussianProcess)
    if isinstance(case, LatentCase):
        assert isinstance(process, LatentProcess)
        levels = case.levels(16, pipe, seed=1)
        with torch.no_grad():
            x, deviation = (one.double() for one in process.posterior(process.encode(levels)))
        spread = deviation**2
    else:
        drawn = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        levels = diffused.scaling.nearest(case.mean + case.deviation * drawn)
        x = diffused.encode(levels, torch.float64)
    report = pipe.bits_per_dim(levels, replicates=16, seed=3)
    term = exact_diffusion_term(x, diffused.schedule.endpoints(), case, spread)
    exact = float(term.mean()) / (levels[0].numel() * math.log(2))
    return report.terms["diffusion"] - exact, report.standard_error


def row(name: str) -> str:
    case = ALL[name]
    error, (off, standard_error) = density_error(case), bound_error(case)
    said = ", ".join(f"`{key}`" for key in case.said) or "nothing; `num_levels` is 256 if not given"
    assert abs(off) < 5 * standard_error, (name, off, standard_error)
    return (
        f"| {case.family} | `{name}` | {case.taken_over} | {said} | bound, ode, importance_weighted | "
        f"{10 ** math.ceil(math.log10(max(error, 1e-12))):.0e} | {off:+.4f} ± {standard_error:.4f} bits/dim |"
    )


def table() -> str:
    head = "| family | scheduler | taken over | what must be said | methods | ode: error, nats | bound: off by |"
    return "\n".join([head, "| --- " * 7 + "|", *map(row, ALL)])


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
