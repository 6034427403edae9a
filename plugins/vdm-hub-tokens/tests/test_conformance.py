"""Processes and likelihood methods keep every law that vdm_hub relies on."""

from __future__ import annotations

from vdm_hub import Check, parametrize_with_checks
from vdm_hub_tokens import AbsorbingProcess, ExactOrder, MaskedCounts, UniformProcess, WeightedOrders


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
