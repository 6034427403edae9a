"""Bits by pixel: they are the terms of the bound, pixel by pixel, and what the data's own probabilities say."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from ddpm import new_network
from exact_denoisers import ExactDenoiser, Mixture, PerPixelSchedule
from tiny import LEVELS, randomised, tiny_pipeline, tiny_unet
from vdm_hub import (
    ConfigurationError,
    DataScaling,
    Epsilon,
    FactorisedDecoder,
    GaussianProcess,
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    UNetVDMModel,
    VDMObjective,
    VDMPipeline,
    VDMScheduler,
    pixel_profile,
    plot_pixel_profile,
)
from vdm_hub.diffusion.conditioning import AffineConditioning

LEVELS_OF_IMAGES = torch.randint(0, LEVELS, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
SCHEDULERS: list[dict[str, Any]] = [
    {},
    {"decoder": "ddpm", "data_scaling": "full"},
    {"prediction_type": "v_prediction"},
    {"noise_schedule": "cosine"},
]


def drawn(objective: VDMObjective, batch: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(len(batch["levels"]), generator=generator)
    return times, objective.draw_noise(batch, generator)


@pytest.mark.parametrize("fields", SCHEDULERS, ids=str)
def test_what_pixels_add_is_each_term_of_the_bound(fields: dict[str, Any]) -> None:
    objective = tiny_pipeline(**fields).objective()
    batch = {"levels": LEVELS_OF_IMAGES}
    times, noise = drawn(objective, batch)
    with torch.no_grad():
        each, terms = objective.terms_by_dimension(batch, times, noise), objective(batch, times, noise).terms
    by_level = objective.process.reconstruction_by_level()
    if by_level is not None:  # by quadrature there, by one draw here
        terms = terms | {"reconstruction": by_level[LEVELS_OF_IMAGES].flatten(1).sum(1).float()}
    assert each.keys() == terms.keys()
    for name, term in terms.items():
        assert each[name].shape == LEVELS_OF_IMAGES.shape
        torch.testing.assert_close(each[name].flatten(1).sum(1), term, rtol=1e-5, atol=1e-5)  # float32, another order


def test_a_schedule_with_a_gamma_for_each_pixel_has_its_terms_too() -> None:
    tilt = torch.linspace(-1, 1, 64).view(1, 8, 8)
    process = GaussianProcess(
        PerPixelSchedule(-8.0, 5.0, tilt, 0.5 * tilt.flip(1), extra=2.0),
        Epsilon(),
        AffineConditioning(),
        FactorisedDecoder(),
        DataScaling("bin_centers", LEVELS),
    )
    objective, batch = VDMObjective(tiny_unet(), process), {"levels": LEVELS_OF_IMAGES}
    times, noise = drawn(objective, batch)
    with torch.no_grad():
        each, terms = objective.terms_by_dimension(batch, times, noise), objective(batch, times, noise).terms
    assert terms.keys() - each.keys() == {"auxiliary"}  # it lies on no pixel
    for name in each:
        torch.testing.assert_close(each[name].flatten(1).sum(1), terms[name], rtol=1e-5, atol=1e-5)


def test_with_the_exact_network_a_pixel_costs_minus_the_logarithm_of_its_probability() -> None:
    chances = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    process = VDMScheduler(num_levels=3).process
    population = Mixture.alphabet(process.scaling.encode(torch.arange(3), torch.float64), chances)
    objective = VDMObjective(ExactDenoiser(population, process), process)
    levels = torch.arange(3).repeat(64)[None, None, None]  # each level 64 times
    profile = pixel_profile(objective, {"levels": levels}, evaluations=512, batch_size=64)
    found = [profile.bits[levels == level] for level in range(3)]
    for bits, chance in zip(found, chances.tolist(), strict=True):
        error = float(bits.std() / math.sqrt(len(bits)))  # pixels are independent but for the times, which are strata
        # 0.005: what a finite span of gamma leaves between the bound and the entropy, at these ends below 0.002.
        assert abs(float(bits.mean()) + math.log2(chance)) < 4 * error + 0.005
        assert error < 0.05


class EachForItself(nn.Module):
    """A network that sees of a pixel nothing but itself."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (torch.tanh(sample) * timestep.reshape(-1, 1, 1, 1).cos(),)


def test_a_pixel_that_nobody_else_looks_at_changes_its_own_bits_alone() -> None:
    objective = VDMObjective(EachForItself(), VDMScheduler(num_levels=LEVELS).process)
    changed = LEVELS_OF_IMAGES.clone()
    changed[1, 0, 2, 3] = (changed[1, 0, 2, 3] + 5) % LEVELS
    first, second = (
        pixel_profile(objective, {"levels": one}, evaluations=8).bits for one in (LEVELS_OF_IMAGES, changed)
    )
    assert (first != second).nonzero().tolist() == [[1, 0, 2, 3]]


def test_it_is_a_function_of_seed_and_place_and_not_of_the_batches() -> None:
    pipe = tiny_pipeline()
    whole, apart = (pipe.pixel_profile(LEVELS_OF_IMAGES, evaluations=6, batch_size=size) for size in (18, 5))
    torch.testing.assert_close(whole.bits, apart.bits, rtol=1e-5, atol=1e-6)  # matrix products of other sizes
    assert torch.equal(whole.times, apart.times)
    fewer = pipe.pixel_profile(LEVELS_OF_IMAGES[:2], evaluations=6)
    torch.testing.assert_close(whole.bits[:2], fewer.bits, rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole.bits, pipe.pixel_profile(LEVELS_OF_IMAGES, evaluations=6, seed=1).bits)


def test_times_are_one_in_each_part_and_their_mean_is_the_term() -> None:
    profile = tiny_pipeline().pixel_profile(LEVELS_OF_IMAGES, evaluations=10)
    assert (profile.times * 10).long().tolist() == [list(range(10))] * 3
    torch.testing.assert_close(profile.over_time.mean(1), profile.terms["diffusion"].flatten(1).mean(1))
    torch.testing.assert_close(profile.bits_per_dim, sum(term.flatten(1).mean(1) for term in profile.terms.values()))


def test_it_is_of_the_class_that_the_model_is_told() -> None:
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=3))
    first, second = (pipe.pixel_profile(LEVELS_OF_IMAGES, label, evaluations=4).bits for label in (0, 2))
    assert not torch.equal(first, second)
    with pytest.raises(ConfigurationError, match="class_labels"):
        pipe.pixel_profile(LEVELS_OF_IMAGES, evaluations=4)


def _hvae() -> HVAEPipeline:
    return HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=LEVELS, latent_shapes=[(4,)]))


def _latent() -> LatentVDMPipeline:
    stage = MarkovianHVAE(8, in_channels=1, num_levels=LEVELS, latent_shapes=[(2, 4, 4)], block_out_channels=(8,))
    sizes: dict[str, Any] = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8,), "norm_num_groups": 4}
    unet = randomised(UNetVDMModel(sample_size=4, layers_per_block=1, fourier_features=(), **sizes))
    return LatentVDMPipeline(stage, unet, VDMScheduler(num_levels=LEVELS))


@pytest.mark.parametrize("make", [_hvae, _latent])
def test_bits_of_latents_lie_on_no_pixel(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="log_likelihood"):
        make().pixel_profile(LEVELS_OF_IMAGES)


def test_a_learned_variance_of_the_last_step_is_refused_rather_than_dropped() -> None:
    stock = DDPMPipeline(new_network(outputs=2), DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(ConfigurationError, match="variance"):
        VDMPipeline.from_diffusers(stock, LEVELS).pixel_profile(LEVELS_OF_IMAGES, evaluations=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_plot_has_a_row_for_each_image(channels: int) -> None:
    pipe = tiny_pipeline(channels=channels)
    levels = LEVELS_OF_IMAGES.expand(-1, channels, -1, -1)
    heights = []
    for count in (1, 2):
        profile = pipe.pixel_profile(levels[:count], evaluations=4)
        plot_pixel_profile(profile, levels[:count] / (LEVELS - 1), file := io.BytesIO())
        heights.append(Image.open(file).height)
    assert heights[1] == 2 * heights[0]
