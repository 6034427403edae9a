"""The report of a classification: who was found, by how much, how often rightly, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdm_hub.errors import DataError, explained, shortened

_BINS = 15


@dataclass(frozen=True)
class Standing:
    """What is known of N images and C candidates; all float64.

    Attributes:
        differences: ``B_c - B_best`` of each candidate in nats, without the prior, (N, C); of the best one 0.
        errors: Their standard errors, (N, C).
        draws: Those that each candidate was measured by, (N, C).
        best: The candidate of the largest posterior, (N,).
        decided: Whether it is the best by the confidence asked for, (N,); false where none was.
        evaluations: Of the bound, over all candidates, (N,).
    """

    differences: Tensor
    errors: Tensor
    draws: Tensor
    best: Tensor
    decided: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class ClassificationReport:
    r"""The posterior of every candidate of each image, and, beside labels, what it is worth.

    Attributes:
        names: Of the candidates, (C,).
        prior: ``p(c)``, (C,), float64.
        standing: Differences of bounds, their errors, and the evaluations that they took.
        pilot_evaluations: Evaluations of the bound, for all images together, that are in no result.
        network_evaluations: Of the network, all together, the pilot's included.
        labels: The candidate that each image is of, (N,); ``None`` where that is not known.
        details: What else is to be said, as plain JSON.

    >>> zeros, one = torch.zeros(1, 2), torch.ones(1, dtype=torch.long)
    >>> standing = Standing(torch.tensor([[0.0, 2.0]]).double(), zeros, zeros, 0 * one, one.bool(), 8 * one)
    >>> report = ClassificationReport(("cat", "dog"), torch.tensor([0.5, 0.5]).double(), standing, 0, 8)
    >>> report.posterior  # e^0 : e^-2
    tensor([[0.8808, 0.1192]], dtype=torch.float64)
    >>> report.scored([0]).accuracy
    1.0
    """

    names: tuple[str, ...]
    prior: Tensor
    standing: Standing
    pilot_evaluations: int
    network_evaluations: int
    labels: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def posterior(self) -> Tensor:
        r"""``p(c|x) \propto p(c) exp(-B_c(x))``, (N, C) (Li et al., arXiv 2303.16203, eq. 5)."""
        return (self.prior.log() - self.standing.differences).softmax(1)

    @property
    def predicted(self) -> Tensor:
        """The candidate of the largest posterior of each image, (N,)."""
        return self.standing.best

    @property
    def evaluations_per_image(self) -> float:
        """The mean number of evaluations of the bound of one candidate at one draw, without the pilot's."""
        return float(self.standing.evaluations.double().mean())

    def scored(self, labels: Tensor | Sequence[int | str]) -> ClassificationReport:
        """The report beside the truth.

        Args:
            labels: The number, from 0, or the name of each image's candidate, (N,).

        Raises:
            DataError: There are more or fewer than images, or one is of no candidate.
        """
        return replace(self, labels=numbered(labels, self.names, len(self.predicted)))

    @property
    def _truth(self) -> Tensor:
        if self.labels is None:
            raise DataError("the images' classes are not known, so nor is how often they were found: give labels.")
        return self.labels

    @property
    def accuracy(self) -> float:
        """The share of images whose candidate was found."""
        return float((self.predicted == self._truth).double().mean())

    @property
    def accuracy_error(self) -> float:
        """The binomial standard error of `accuracy`, over images of the same population.

        That of Jeffreys' posterior, a Beta(k + 1/2, N - k + 1/2) of k of N images: not zero where none or all are
        found.
        """
        found, count = self.accuracy * len(self._truth) + 0.5, len(self._truth) + 1
        return math.sqrt(found * (count - found) / (count**2 * (count + 1)))

    @property
    def expected_calibration_error(self) -> float:
        """``sum over bins of (images/N) |accuracy - mean posterior|`` (Guo et al., arXiv 1706.04599, eq. 3).

        The 15 bins divide [0, 1] evenly; the posterior is that of the candidate found.
        """
        sure, right = self.posterior.amax(1), (self.predicted == self._truth).double()
        bins = (sure * _BINS).ceil().long() - 1
        gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, right - sure)
        return float(gaps.abs().sum() / len(sure))

    @property
    def confusion(self) -> Tensor:
        """The numbers of images by what they are (rows) and what was found (columns), (C, C)."""
        count = len(self.names)
        return torch.bincount(self._truth * count + self.predicted, minlength=count**2).view(count, count)

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON object; each image's posterior is in `posterior` alone."""
        evaluations = {
            "evaluations_per_image": self.evaluations_per_image,
            "pilot_evaluations": self.pilot_evaluations,
            "network_evaluations": self.network_evaluations,
        }
        figures = {
            "num_images": len(self.predicted),
            "candidates": list(self.names),
            "prior": self.prior.tolist(),
            "decided": float(self.standing.decided.double().mean()),
        }
        if self.labels is not None:
            figures |= {
                "accuracy": self.accuracy,
                "accuracy_error": self.accuracy_error,
                "expected_calibration_error": self.expected_calibration_error,
                "confusion": self.confusion.tolist(),
            }
        return figures | evaluations | self.details

    def __str__(self) -> str:
        lines = [f"{len(self.predicted)} images, {len(self.names)} candidates"]
        if self.labels is not None:
            lines[0] += f": accuracy {100 * self.accuracy:.2f} ± {100 * self.accuracy_error:.2f} %"
            lines.append(f"  expected calibration error {100 * self.expected_calibration_error:.2f} %")
        lines.append(
            f"  {self.evaluations_per_image:.1f} evaluations an image, and {self.pilot_evaluations} of a pilot; "
            f"{100 * float(self.standing.decided.double().mean()):.1f} % of images decided within the budget"
        )
        uniform = bool((self.prior == self.prior[0]).all())
        lines.append(f"  prior: {'uniform' if uniform else ', '.join(f'{p:.4g}' for p in self.prior.tolist())}")
        return "\n".join([*lines, *self._table()])

    def _table(self) -> list[str]:
        """A line for each candidate: its images, how many of them were found, and how much of what it got is right."""
        if self.labels is None:
            return []
        width = max(8, *(len(name) + 2 for name in self.names))
        rows, right = self.confusion.sum(1), self.confusion.diagonal()
        found = zip(self.names, rows.tolist(), right.tolist(), self.confusion.sum(0).tolist(), strict=True)
        lines = [
            f"  {name:<{width}}{of:>8}{_share(hit, of):>10}{_share(hit, given):>12}" for name, of, hit, given in found
        ]
        return [f"  {'class':<{width}}{'images':>8}{'found':>10}{'precision':>12}", *lines]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def numbered(labels: Tensor | Sequence[int | str], names: Sequence[str], count: int) -> Tensor:
    """What some images are, as the numbers of their candidates, int64, (count,).

    Args:
        labels: By number, from 0, or by name.
        names: Of the candidates.
        count: How many images there are.

    Raises:
        DataError: There are more or fewer than images, or one is of no candidate.
    """
    with explained("the labels are no numbers", "give the number or the name of each image's candidate", DataError):
        named = isinstance(labels, list | tuple) and any(isinstance(one, str) for one in labels)
        known: dict[Any, int] = {name: number for number, name in enumerate(names)}
        for image, one in enumerate(labels if named else ()):
            if isinstance(one, str) and one not in known:
                raise DataError(
                    f"image {image} is {shortened(one)}, and that is none of the candidates "
                    f"{shortened(list(names), 300)}: add it, or leave such images out."
                )
        given = torch.as_tensor([known.get(one, one) for one in labels] if named else labels).cpu()
    if given.is_floating_point() or given.dtype == torch.bool:
        raise DataError(f"the labels are {given.dtype}: give the number or the name of each image's candidate.")
    if given.shape != (count,):
        raise DataError(f"{tuple(given.shape)} labels for {count} images: give one each.")
    if bool(((given < 0) | (given >= len(names))).any()):
        raise DataError(
            f"the labels run from {int(given.min())} to {int(given.max())}, and there are candidates 0 to "
            f"{len(names) - 1}: name the column of the classes that the network knows."
        )
    return given.long()
