"""`TokenObjective`: what its bits are counted by, and of which processes it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import registered
from naming import naming
from plugin_of_law_7 import ResamplingProcess
from tiny_tokens import LENGTH, pipeline
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.errors import ConfigurationError
from vdm_hub.objectives.tokens import TokenObjective, check_token_process

pytestmark = pytest.mark.usefixtures("token_plugin")


def test_bits_are_counted_by_what_a_window_scores() -> None:
    pipe = pipeline()
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % pipe.num_levels
    batch, times = {"levels": tokens, "indices": torch.arange(2)}, torch.tensor([0.3, 0.8])
    found = {}
    for scored in (None, LENGTH // 2):
        objective = TokenObjective(pipe.token_network(), pipe.process, scored=scored)
        noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
        bound = objective(batch, times, noise)
        found[scored] = bound.bits_per_dim()["diffusion"]
        assert bound.dimensions == (scored or LENGTH) and bool((bound.total > 0).all())
    torch.testing.assert_close(found[LENGTH // 2], 2 * found[None])


class Weighted(ResamplingProcess):
    """A process of tokens with weights, as it says itself."""

    has_weights = True

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape, self.num_levels)


class OfImages(ResamplingProcess):
    """Of data of three dimensions alone."""

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = shape
        return (channels * self.num_levels, height, width)


@pytest.mark.parametrize(
    ("process", "why"),
    [
        (registered.process(LinearSchedule(-6.0, 4.0)), "K logits"),
        (OfImages(), "K logits"),
        (Weighted(), "weights"),
    ],
    ids=["GaussianProcess", "OfImages", "Weighted"],
)
def test_a_process_that_is_none_of_tokens_is_refused_by_what_it_lacks(process: ForwardProcess, why: str) -> None:
    with pytest.raises(ConfigurationError, match=naming(type(process).__name__, why, "forward_process")):
        check_token_process(process)
