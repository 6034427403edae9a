"""Processes and likelihood methods keep every law that vdm_hub relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vdm_hub import Check, LawViolation, Noise, check_forward_process, parametrize_with_checks
from vdm_hub_tokens import AbsorbingProcess, ExactOrder, MaskedCounts, UniformProcess, WeightedOrders
from vdm_hub_tokens.processes import BoundUniform


@parametrize_with_checks(
    [
        AbsorbingProcess(5),
        AbsorbingProcess(3, "polynomial", 2.0),
        AbsorbingProcess(2, "cosine"),
        AbsorbingProcess(40, "squared_cosine", num_train_timesteps=100),
        AbsorbingProcess(5, remasking=0.5, remasking_cap=0.3),
        UniformProcess(5),
        UniformProcess(2, "polynomial", 2.0),
        UniformProcess(3, "cosine", num_train_timesteps=100),
        UniformProcess(4, "squared_cosine"),
        MaskedCounts(),
        MaskedCounts(counts_per_text=3, pilot_evaluations=0),
        ExactOrder(),
        ExactOrder("lowest_entropy", opened_at_once=3),
        WeightedOrders(draws=2),
        WeightedOrders(draws=3, opened_at_once=5),
    ]
)
def test_conformance(check: Check) -> None:
    check()


class StepOfAnother(BoundUniform):
    def reverse_step(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Any) -> Any:
        return super().reverse_step(0.7 * output, z_t, s, t, generator)


class SaysAnotherStep(BoundUniform):
    def reverse_probabilities(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return super().reverse_probabilities(output, z_t, 1.1 * s, t)

    def reverse_step(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Any) -> Any:
        return BoundUniform(self.process, None, None).reverse_step(output, z_t, s, t, generator)


class SaysAnotherCorruption(BoundUniform):
    def transition_probabilities(self, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return super().transition_probabilities(z_s, s, 0.9 * t)


class PriorOfOneValue(BoundUniform):
    def prior_sample(self, shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
        return torch.zeros(shape)


@pytest.mark.parametrize("bound", [StepOfAnother, SaysAnotherStep, SaysAnotherCorruption, PriorOfOneValue])
def test_a_process_that_draws_otherwise_than_it_says_is_caught(bound: type[BoundUniform]) -> None:
    class Broken(UniformProcess):
        def bind_given(self, x: Tensor | None, noise: Noise, given: Tensor | None) -> Any:
            return {}, bound(self, x, given)

    with pytest.raises(LawViolation, match="values_are_as_likely_as_said"):
        check_forward_process(Broken(5))
