r"""The bound without its condition: ``B_mix(x) = -log sum_c p(c) exp(-B_c(x))``, and what a label is worth.

``p(x) = sum_c p(c) p(x|c)`` and ``p(x|c) >= exp(-B_c)``, so B_mix bounds ``-log p(x)`` too. For each c the sum is at
least its own term, ``B_mix <= B_c - log p(c)``, so that the gain by a label, ``B_mix - B_c``, is at most
``-log2 p(c)`` bits an image, whatever the model; on the same draws this holds for the estimates as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdm_hub.data.conditions import Candidates
from vdm_hub.errors import NonFiniteLossError
from vdm_hub.likelihood.measurement import Batches, Measured, Measurement
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.variational_bound import Batch

_ROUNDING = 1e-9  # of a logarithm of a sum, in float64, relative to the bounds


class MarginalMeasurement(Measurement):
    """A likelihood method under every candidate on the same draws: each image's own, and the mixture beside it.

    Batches carry the condition's entry, such as ``class_labels``, (B,), which this tells the network. What is reported
    is the inner measurement's, of each image's own class or caption, to the last bit; ``details["marginal"]`` is of
    the mixture.

    Args:
        inner: The method on a conditional model.
        candidates: The components of the mixture; every image's own is one of them.
        prior: ``p(c)``, (C,), float64.
    """

    def __init__(self, inner: Measurement, candidates: Candidates, prior: Tensor) -> None:
        super().__init__(inner.objective, inner.seed)
        self.inner, self.candidates, self.prior = inner, candidates, prior
        self.method, self.is_bound, self.options = inner.method, inner.is_bound, inner.options

    @property
    def pilot_evaluations(self) -> int:
        """Network evaluations of the inner measurement's pilot."""
        return self.inner.pilot_evaluations

    @pilot_evaluations.setter
    def pilot_evaluations(self, value: int) -> None:
        self.inner.pilot_evaluations = value

    def fit(self, batches: Batches) -> None:
        """Run the inner measurement's pilot, on what each image is."""
        self.inner.fit(lambda: map(self.candidates.condition.told, batches()))

    def state(self) -> dict[str, Any]:
        """The inner measurement's."""
        return self.inner.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`."""
        self.inner.load_state(state)

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The inner measurement of what each image is, with every candidate's total beside it, in nats, (B, C)."""
        condition, numbers = self.candidates.condition, batch[self.candidates.condition.entry]
        told = [condition.told({**batch, condition.entry: torch.full_like(numbers, one)}) for one in self._numbers]
        every = [self.inner.measure(one, replicate) for one in told]
        places = self.candidates.places(numbers.cpu())
        own = Measured(*(_own([getattr(one, kind) for one in every], places) for kind in ("terms", "diagnostics")))
        totals = torch.stack([torch.stack(list(one.terms.values())).sum(0) for one in every], 1)
        extra = {"by_class": totals, "class_label": places.double()}
        if "evaluations" in own.diagnostics:
            extra["evaluations"] = torch.stack([one.diagnostics["evaluations"] for one in every]).sum(0)
        return Measured(own.terms, own.diagnostics | extra)

    @property
    def _numbers(self) -> list[int]:
        numbers: list[int] = self.candidates.numbers.tolist()
        return numbers

    def fewest_evaluations(self, replicates: int) -> int:
        """The inner measurement's pilot, and its replicates for each candidate."""
        pilot = self.inner.fewest_evaluations(0)
        return pilot + len(self.prior) * (self.inner.fewest_evaluations(replicates) - pilot)

    def protocol(self) -> dict[str, Any]:
        """The inner measurement's, the candidates and their prior."""
        mixture = {"candidates": self._numbers, "prior": self.prior.tolist()}
        return self.inner.protocol() | {"marginal": mixture}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The inner measurement's, and the figures of the mixture: see `marginal_figures`."""
        labels = diagnostics["class_label"][0].long()
        figures = marginal_figures(diagnostics["by_class"], labels, self.prior)
        return self.inner.details(diagnostics) | {"marginal": figures | {"prior": self.prior.tolist()}}

    def notes(self, report: LikelihoodReport) -> list[str]:
        """The inner measurement's."""
        return self.inner.notes(report)


def _own(of_candidates: list[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
    """By name, each image's values of its own candidate."""
    rows = torch.arange(len(labels))
    return {name: torch.stack([one[name] for one in of_candidates])[labels, rows] for name in of_candidates[0]}


def marginal_figures(by_class: Tensor, labels: Tensor, prior: Tensor) -> dict[str, Any]:
    """The mixture's bound and the gain by a label, as plain JSON.

    B_mix is a concave function of the bounds, so its estimate from R replicates lies below it, by about 1/R of
    something. The jackknife (Efron, The Jackknife, 1982, ch. 2) estimates that, which is added, up to the law's most,
    and an error; as what is left of the bias is not known, the error holds the whole of what was added as well.

    Args:
        by_class: B_c in nats, (replicates, images, classes).
        labels: Of the images, (images,).
        prior: ``p(c)``, (classes,).

    Raises:
        NonFiniteLossError: A gain is above ``-log2 p(c)``, or is not finite; the message names the image.

    >>> bounds = torch.tensor([[[1.0, 9.0]], [[3.0, 9.0]]]).double()
    >>> figures = marginal_figures(bounds, torch.tensor([0]), torch.tensor([0.5, 0.5]).double())
    >>> round(figures["gain_bits"], 4), figures["most_bits"]
    (0.9994, 1.0)
    """
    count, images = by_class.shape[:2]
    gain, most = gain_bits(by_class.mean(0), labels, prior), float(-prior[labels].log2().mean())
    mean, error, bias = float(gain.mean()), None, None
    if count > 1:
        others = (by_class.sum(0) - by_class) / (count - 1)
        left_out = torch.stack([gain_bits(one, labels, prior).mean() for one in others])
        bias = (count - 1) * (float(left_out.mean()) - mean)
        error = math.hypot(float(((count - 1) * left_out.var(correction=0)).sqrt()), bias)
        mean = min(mean - bias, most)
    own = by_class[:, torch.arange(images), labels].mean() / math.log(2)
    return {
        "gain_bits": mean,
        "most_bits": most,
        "standard_error": error,
        "monte_carlo_bias": bias,
        "standard_error_over_images": float(gain.std() / math.sqrt(images)) if images > 1 else None,
        "mixture_bits": float(own) + mean,
    }


def mixture(bounds: Tensor, prior: Tensor) -> Tensor:
    """``B_mix`` of each image in nats, (images,), of its bounds, (images, classes)."""
    return -(prior.log() - bounds).logsumexp(1)


def gain_bits(bounds: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
    """``(B_mix - B_c) / ln 2`` of each image, c its own class, (images,): see `marginal_figures`."""
    own = bounds.gather(1, labels[:, None])[:, 0]
    gain, most = (mixture(bounds, prior) - own) / math.log(2), -prior[labels].log2()
    lawful = gain <= most + _ROUNDING * (1 + own.abs())
    if not bool(lawful.all()):
        image = int((~lawful).nonzero()[0, 0])
        raise NonFiniteLossError(
            f"the gain by its label of image {image} is {float(gain[image])} bits, and no gain is above "
            f"{float(most[image]):.6g}: its bounds are not finite, or not of the same draws. Evaluate an earlier "
            f"checkpoint, or look at that image."
        )
    return gain
