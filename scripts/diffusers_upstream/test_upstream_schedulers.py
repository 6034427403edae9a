"""diffusers' `SchedulerCommonTest` on `VDMScheduler`: the VDM, each of its targets, and the DDPM family."""

from __future__ import annotations

import unittest
from typing import Any

import torch

from tests.schedulers import test_scheduler_ddpm, test_schedulers
from vdm_hub import VDMScheduler


class _VDMCommonTest(test_schedulers.SchedulerCommonTest):
    scheduler_classes = (VDMScheduler,)
    forward_default_kwargs = (("num_inference_steps", 50),)
    fields: dict[str, Any] = {}

    def get_scheduler_config(self, **kwargs: Any) -> dict[str, Any]:
        return self.fields | kwargs

    def test_timesteps(self) -> None:
        for timesteps in (2, 5, 100, 1000):
            self.check_over_configs(time_step=None, num_train_timesteps=timesteps)

    def test_time_indices(self) -> None:
        for index in (1, 500, 999):
            self.check_over_forward(time_step=index)


class VDMSchedulerTest(_VDMCommonTest):
    def test_schedules(self) -> None:
        for schedule in ("linear", "cosine", {"name": "tabulated", "config": {"gammas": [-9.0, -1.0, 5.0]}}):
            self.check_over_configs(time_step=None, noise_schedule=schedule)

    def test_prediction_type(self) -> None:
        for target in ("epsilon", "sample", "score", "v_prediction"):
            self.check_over_configs(time_step=None, prediction_type=target)

    def test_levels(self) -> None:
        for levels in (2, 17, 256):
            self.check_over_configs(time_step=None, num_levels=levels)


class VDMSchedulerCosineVelocityTest(_VDMCommonTest):
    fields = {"noise_schedule": "cosine", "prediction_type": "v_prediction"}

    @unittest.skip("asks for a beta table beside a noise_schedule that it contradicts, which VDMScheduler refuses")
    def test_trained_betas(self) -> None: ...


class VDMSchedulerDiscreteBetasTest(_VDMCommonTest):
    """A beta table as a VDM: its chain ends at z_0."""

    fields = {"noise_schedule": "discrete_betas", "final_sigmas_type": "sigma_min"}


class VDMSchedulerAsDDPMTest(test_scheduler_ddpm.DDPMSchedulerTest):
    """All of diffusers' tests of its DDPMScheduler, with its reference numbers, on the DDPM family."""

    scheduler_classes = (VDMScheduler,)

    def get_scheduler_config(self, **kwargs: Any) -> dict[str, Any]:
        # The marker of the DDPM family, which `VDMScheduler.from_config` adds to a stock config.
        return {"noise_schedule": "discrete_betas", **super().get_scheduler_config(**kwargs)}

    def test_timesteps(self) -> None:
        # Upstream's, without its table of one latent: no transition, so no VDM.
        for timesteps in (5, 100, 1000):
            self.check_over_configs(num_train_timesteps=timesteps)

    def test_betas(self) -> None:
        # Upstream's, without betas up to 0.2 (alpha-bar underflows to 0, so SNR no longer falls) and up to 2.
        for beta_start, beta_end in ((0.0001, 0.002), (0.001, 0.02)):
            self.check_over_configs(beta_start=beta_start, beta_end=beta_end)

    @unittest.skip("calls previous_timestep, a helper inside DDPMScheduler; the loops compare what it is for")
    def test_custom_timesteps(self) -> None: ...

    @unittest.skip("calls _get_variance, private to DDPMScheduler; the full loops compare what it is used for")
    def test_variance(self) -> None: ...


def test_reaches_the_installed_diffusers() -> None:
    """Not the checkout's."""
    import diffusers

    assert "site-packages" in (diffusers.__file__ or "") and torch.is_tensor(VDMScheduler().timesteps)
