"""diffusers' own DDPM chain on a table of betas: its grid and its steps, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import whole_number
from vdm_hub.schedulers.configs import DDPM_KEYS, STOCK_TARGETS


class StockDDPM:
    """The stock DDPM of a config with a table of betas, as `VDMScheduler` runs it.

    Args:
        config: Of a `VDMScheduler`, whose keys of diffusers' are read.

    Attributes:
        ddpm: diffusers' scheduler.
        ends_at_data: Whether the chain ends at the data, as DDPM's does, and not at ``z_0``, which is decoded.

    >>> chain = StockDDPM(DDPMScheduler(num_train_timesteps=10).config | {"final_sigmas_type": "zero"})
    >>> times, timesteps = chain.grid(5, None)
    >>> timesteps.tolist(), chain.interval(timesteps[0])
    ([8, 6, 4, 2, 0], (0.6666666666666666, 0.8888888888888888))
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        arguments = {key: config[key] for key in DDPM_KEYS if key in config}
        self._converts = arguments["prediction_type"] not in STOCK_TARGETS
        if self._converts:
            arguments["prediction_type"] = "epsilon"
        self.ddpm = DDPMScheduler(**arguments)
        self.ends_at_data = config["final_sigmas_type"] == "zero"
        self._last = int(self.ddpm.config.num_train_timesteps) - 1

    @property
    def clipping(self) -> Callable[[Tensor], Tensor] | None:
        """What its steps do to their estimates of the data, where they do: thresholding, or clipping."""
        config = self.ddpm.config
        if not self.ends_at_data or not (config.thresholding or config.clip_sample):
            return None
        if config.thresholding:
            thresholded: Callable[[Tensor], Tensor] = self.ddpm._threshold_sample
            return thresholded
        most = float(config.clip_sample_range)
        return lambda x_hat: x_hat.clamp(-most, most)

    def grid(self, steps: int | None, timesteps: Sequence[float] | None) -> tuple[Tensor, Tensor]:
        """The times, (N,), float64, and the whole timesteps of so many steps, or of given timesteps.

        Raises:
            ConfigurationError: They are no whole numbers of the chain, or more than it has.
        """
        if timesteps is not None:
            whole = [whole_number("a timestep", int(t) if t.is_integer() else t, 0, self._last) for t in timesteps]
            self.ddpm.set_timesteps(timesteps=whole)
        else:
            self.ddpm.set_timesteps(whole_number("num_inference_steps", steps, 1, self._last + 1))
        return self.ddpm.timesteps.double() / self._last, self.ddpm.timesteps

    def interval(self, timestep: float | Tensor) -> tuple[float, float]:
        """``(s, t)`` of the step that starts at a timestep.

        Raises:
            ConfigurationError: It is the last, which is no draw.
        """
        before = int(self.ddpm.previous_timestep(int(timestep)))
        if before < 0:
            raise ConfigurationError(
                f"the step from timestep {int(timestep)} is the last of DDPM's chain, which ends at the data without "
                f"a draw, so it has no density: leave it out."
            )
        return before / self._last, int(timestep) / self._last

    def step(
        self, process: GaussianProcess, output: Tensor, timestep: Any, sample: Tensor, generator: Any
    ) -> tuple[Tensor, Tensor]:
        """Diffusers' step, and its estimate of the data; a target that it does not know is converted to the noise."""
        index = int(timestep)
        if self._converts:
            gamma = process.schedule.gammas[index]  # type: ignore[index]
            mean, variance = process.split(output, sample)
            eps_hat = process.parameterization.eps_hat(mean, sample, gamma).to(sample.dtype)
            output = torch.cat([eps_hat, variance], dim=1) if process.variance.learned else eps_hat
        stepped: tuple[Tensor, Tensor] = self.ddpm.step(output, index, sample, generator, return_dict=False)
        return stepped
