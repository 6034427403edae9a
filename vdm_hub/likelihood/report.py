"""What is said of a likelihood: its number, its terms and its uncertainty, never one without the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class LikelihoodReport:
    """A likelihood of a set of images.

    Attributes:
        terms_per_image: Each term in nats, (replicates, images), float64. A replicate is one independent estimate.
        times: The time at which each diffusion term was estimated, (replicates, images).
        dimensions: Dimensions of one image.
        is_bound: Whether the number bounds the negative log-likelihood from above, rather than estimating it.
        method: How it was computed.
        transitions: Number of transitions T; ``None`` for continuous time.
        network_evaluations: Calls of the network, counted per image.
    """

    terms_per_image: dict[str, Tensor]
    times: Tensor
    dimensions: int
    is_bound: bool = True
    method: str = "bound"
    transitions: int | None = None
    network_evaluations: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def _total(self) -> Tensor:
        return torch.stack(list(self.terms_per_image.values())).sum(0) / (self.dimensions * math.log(2))

    @property
    def num_images(self) -> int:
        """How many images were measured."""
        return int(self._total.shape[1])

    @property
    def replicates(self) -> int:
        """How many independent estimates there are of each image."""
        return int(self._total.shape[0])

    @property
    def per_image(self) -> Tensor:
        """Bits per dimension of each image, (images,), the mean of its replicates."""
        return self._total.mean(0)

    @property
    def log_likelihood(self) -> Tensor:
        """Log p(x) of each image in nats, (images,): a lower bound where `is_bound`."""
        return -self.per_image * self.dimensions * math.log(2)

    @property
    def bits_per_dim(self) -> float:
        """The mean over images."""
        return float(self._total.mean())

    @property
    def standard_error(self) -> float:
        """Monte Carlo standard error of `bits_per_dim` over these very images, from independent replicates."""
        return _standard_error(self._total.mean(1))

    @property
    def standard_error_over_images(self) -> float:
        """Standard error of the mean as an estimate for the population that the images come from."""
        return _standard_error(self.per_image)

    @property
    def terms(self) -> dict[str, float]:
        """Each term's mean in bits per dimension."""
        scale = self.dimensions * math.log(2)
        return {name: float(term.mean()) / scale for name, term in self.terms_per_image.items()}

    def with_notes(self, notes: Sequence[str]) -> LikelihoodReport:
        """The report, with sentences that a reader of its number must know; printed below it."""
        if notes:
            self.details["notes"] = [*self.details.get("notes", []), *notes]
        return self

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON object; a standard error that one replicate can't give is null."""
        return {
            "bits_per_dim": self.bits_per_dim,
            "standard_error": _finite(self.standard_error),
            "standard_error_over_images": _finite(self.standard_error_over_images),
            "terms": self.terms,
            "num_images": self.num_images,
            "network_evaluations": self.network_evaluations,
            "replicates": self.replicates,
            "transitions": self.transitions,
            "is_bound": self.is_bound,
            "method": self.method,
            "dimensions": self.dimensions,
        } | self.details

    def __str__(self) -> str:
        sign = "<=" if self.is_bound else "="
        time = "continuous time" if self.transitions is None else f"{self.transitions} transitions"
        lines = [
            f"-log2 p(x) / dim {sign} {self.bits_per_dim:.4f} bits/dim   "
            f"standard error {self.standard_error:.4f} (Monte Carlo), {self.standard_error_over_images:.4f} (images)"
        ]
        lines += [f"  {name:<16}{value:>10.4f}" for name, value in self.terms.items()]
        lines.append(
            f"  {self.num_images} images, {self.replicates} replicates, {self.network_evaluations} network "
            f"evaluations, {time}"
        )
        return "\n".join(lines + [f"  note: {note}" for note in self.details.get("notes", [])])


def _standard_error(values: Tensor) -> float:
    if values.numel() < 2:
        return math.nan
    return float(values.std() / math.sqrt(values.numel()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
