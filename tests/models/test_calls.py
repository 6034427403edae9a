"""Networks and processes that do not belong together are refused before they meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import registered
from exact_denoisers import PerPixelSchedule
from naming import naming
from tiny import tiny_unet
from vdm_hub.diffusion.noise_schedules import BoundGamma, LinearSchedule
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.calls import check_context, named_arguments
from vdm_hub.objectives.variational_bound import VDMObjective


class Telling(LinearSchedule):
    """It tells its network two numbers."""

    context_size = 2

    def bind(self, x: Tensor | None, noise: Any) -> Any:
        return {}, BoundGamma(self.forward, torch.zeros(1, 2))


class Anything(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        return (sample,)


class Nothing(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, *, mask: Any = None, return_dict: bool = True) -> Any:
        return (sample,)


def per_pixel(*shape: int) -> Any:
    return registered.process(PerPixelSchedule(-8.0, 5.0, torch.zeros(shape), torch.zeros(shape)), num_levels=17)


def test_what_a_network_takes_by_name() -> None:
    assert named_arguments(Anything()) is None
    assert named_arguments(Nothing()) == ["mask"]
    assert named_arguments(tiny_unet()) == ["class_labels"]
    text = ["encoder_hidden_states", "encoder_attention_mask"]
    assert named_arguments(tiny_unet(cross_attention_dim=4)) == ["class_labels", *text]


class Told(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, context: Any = None, return_dict: bool = True) -> Any:
        return (sample,)


def test_a_network_that_can_t_be_told_is_refused_and_one_that_takes_anything_is_not() -> None:
    process = registered.process(Telling(), num_levels=17)
    for network in (Nothing(), tiny_unet(), tiny_unet(context_size=3)):
        with pytest.raises(ConfigurationError, match=naming(type(network).__name__, "context_size", 2)):
            VDMObjective(network, process)
    with pytest.raises(ConfigurationError, match=naming("UNetVDMModel", 3)):
        VDMObjective(tiny_unet(context_size=3), registered.process(LinearSchedule(), num_levels=17))
    for network in (Anything(), Told(), tiny_unet(context_size=2)):
        assert VDMObjective(network, process).network is network
    assert VDMObjective(Nothing(), registered.process(LinearSchedule(), num_levels=17)).transitions is None


@pytest.mark.parametrize(("told", "taken"), [(None, 2), (2, None), (2, 3)])
def test_context_has_one_length(told: int | None, taken: int | None) -> None:
    check_context(taken, tiny_unet(context_size=taken))
    with pytest.raises(ConfigurationError, match=naming("context_size", told)):
        check_context(told, tiny_unet(context_size=taken))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 8), (1, 8, 1), (1,), (1, 8)])
def test_a_gamma_per_pixel_or_the_same_along_some_dimension_fits(shape: tuple[int, ...]) -> None:
    per_pixel(*shape).check_shape((1, 8, 8))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (1, 8, 7), (1, 8, 8, 8), (8, 8)])
def test_a_gamma_for_other_pixels_is_refused(shape: tuple[int, ...]) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ConfigurationError, match=naming(shape, "(1, 8, 8)")):
        per_pixel(*shape).check_shape((1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
