"""A report of a method by the loop that `evaluate` runs, on images that come as a test has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vdm_hub.evaluation.measuring import ReplicateStages, measure_images
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.report import LikelihoodReport


def measured(
    measurement: Measurement, batches: Callable[[], Iterable[dict[str, Tensor]]], replicates: int = 8, **stages: Any
) -> LikelihoodReport:
    """The report; images are measured at most as many at once as the first batch holds."""
    parts = list(batches())
    order = torch.cat([part["indices"] for part in parts]).argsort()
    whole = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
    return measure_images(
        measurement,
        lambda indices: {name: value[indices] for name, value in whole.items()},
        len(order),
        ReplicateStages(replicates, **{"max_replicates": max(256, replicates)} | stages),
        batch_size=len(parts[0]["indices"]),
        progress=False,
    )
