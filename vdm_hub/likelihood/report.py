"""The report of a likelihood: its number, its terms and its uncertainty, never one without the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdm_hub.data.kinds import TOKENS, Units
from vdm_hub.errors import VDMHubError, in_one_line
from vdm_hub.likelihood.stages import FEWEST_REPLICATES


@dataclass
class LikelihoodReport:
    """A likelihood of a set of images, or of texts.

    What is said of images and of bits/dim holds of the windows of texts and of bits/token: see ``units``.

    Attributes:
        terms_per_image: Each term in nats, (replicates, images), float64. A replicate is one independent estimate.
        times: The time at which each diffusion term was estimated, (replicates, images) or (replicates, images, n);
            ``None`` where the method has none.
        dimensions: Dimensions of one image; of texts, the tokens of a window that are scored, on average.
        is_bound: Whether the number bounds the negative log-likelihood from above, rather than estimating it.
        method: How it was computed.
        transitions: Number of transitions T; ``None`` for continuous time.
        network_evaluations: Calls of the network, counted per image.
        details: What else is to be said, as plain JSON: the protocol, the dataset, versions, notes.
        integrand: The diffusion term in nats at its own time, importance weight included, control variate left out,
            shaped like ``times``; ``None`` where the diffusion term itself is that.
        units: What bits are counted by.
        is_deterministic: Whether nothing was drawn: then there is no Monte Carlo error.
    """

    terms_per_image: dict[str, Tensor]
    times: Tensor | None
    dimensions: float
    is_bound: bool = True
    method: str = "bound"
    transitions: int | None = None
    network_evaluations: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    integrand: Tensor | None = None
    units: Units = field(default_factory=Units)
    is_deterministic: bool = False

    @property
    def _total(self) -> Tensor:
        return torch.stack(list(self.terms_per_image.values())).sum(0) / (self.dimensions * math.log(2))

    @property
    def num_images(self) -> int:
        """The number of images that were measured."""
        return int(self._total.shape[1])

    @property
    def replicates(self) -> int:
        """The number of independent estimates of each image."""
        return int(self._total.shape[0])

    @property
    def per_image(self) -> Tensor:
        """The bits per dimension of each image, (images,), the mean of its replicates."""
        return self._total.mean(0)

    @property
    def log_likelihood(self) -> Tensor:
        """The log-likelihood of each image in nats, (images,): a lower bound where `is_bound`."""
        return -self.per_image * self.dimensions * math.log(2)

    @property
    def bits_per_dim(self) -> float:
        """The mean bits per dimension over images."""
        return float(self._total.mean())

    @property
    def standard_error(self) -> float:
        """The Monte Carlo standard error of `bits_per_dim` over these very images, from independent replicates."""
        return 0.0 if self.is_deterministic else _standard_error(self._total.mean(1))

    @property
    def standard_error_over_images(self) -> float:
        """The standard error of the mean as an estimate for the population that the images come from.

        Where data have different numbers of values it is that of a ratio, of the bits and the values of each.
        """
        if self.units.each is None:
            return _standard_error(self.per_image)
        return _standard_error(self.per_image - self.bits_per_dim * self.units.each.double() / self.dimensions)

    @property
    def standard_error_per_image(self) -> Tensor:
        """The Monte Carlo standard error of each image's `per_image`, (images,); NaN from one replicate of draws."""
        if self.is_deterministic:
            return torch.zeros(self.num_images, dtype=torch.float64)
        if self.replicates < 2:
            return torch.full((self.num_images,), math.nan, dtype=torch.float64)
        return self._total.std(0) / math.sqrt(self.replicates)

    @property
    def leading_error(self) -> float:
        """The `standard_error` in the unit in which one is asked for: that of `Units.leading`."""
        return self.units.by_leading(self.standard_error)

    @property
    def bits_per_byte(self) -> float | None:
        """The bits per UTF-8 byte of texts, every byte counted once; ``None`` where that has no meaning."""
        return None if self.units.bytes_per_value is None else self.bits_per_dim / self.units.bytes_per_value

    @property
    def perplexity(self) -> float:
        """``2^(bits per token)`` (or per dimension): the number of equally likely values that is as uncertain."""
        return float(2.0**self.bits_per_dim)

    @property
    def reached(self) -> bool:
        """Whether the standard error that was asked for was reached; true where none was."""
        return bool(self.details.get("target", {}).get("reached", True))

    @property
    def terms_of_each(self) -> dict[str, Tensor]:
        """The terms of each image in bits per dimension, (images,), the mean of its replicates."""
        scale = self.dimensions * math.log(2)
        return {name: term.mean(0) / scale for name, term in self.terms_per_image.items()}

    def table(self) -> str:
        """The figures of each image as a table in Markdown: bits/dim with their Monte Carlo error, all bits, terms."""
        terms, sign = self.terms_of_each, "at most " if self.is_bound else ""
        datum, unit = self.units.kind.datum, self.units.kind.unit
        lines = [f"| {datum} | {unit} | bits in all | {' | '.join(terms)} |", "| --- " * (3 + len(terms)) + "|"]
        for i, (bits, error) in enumerate(zip(self.per_image, self.standard_error_per_image, strict=True)):
            each = " | ".join(f"{float(term[i]):.3f}" for term in terms.values())
            total = f"{float(bits) * self.dimensions:.1f}"
            shown = f"{sign}**{bits:.3f}** ± {_shown(float(error), 'replicates')}"
            lines.append(f"| {i + 1} | {shown} | {sign}{total} | {each} |")
        return "\n".join(lines)

    @property
    def terms(self) -> dict[str, float]:
        """The mean of each term in bits per dimension."""
        scale = self.dimensions * math.log(2)
        return {name: float(term.mean()) / scale for name, term in self.terms_per_image.items()}

    def with_notes(self, notes: Sequence[str]) -> LikelihoodReport:
        """The report, with sentences that a reader of its number must know; printed below it."""
        if notes:
            self.details["notes"] = [*self.details.get("notes", []), *notes]
        return self

    def with_clipped(self, measure: Callable[[], LikelihoodReport]) -> LikelihoodReport:
        """The report, with that of the same model whose estimates of the data are clipped beside it.

        A flow with kinks may be too much for a solver that the smooth one is not: that is said, and no figure lost.
        """
        try:
            clipped = measure()
        except VDMHubError as error:
            if self.is_bound:
                raise
            return self.with_notes([f"the clipped model could not be measured: {in_one_line(error)}"])
        keys = ("bits_per_dim", "standard_error", "standard_error_over_images", "terms", "network_evaluations")
        figures = clipped.to_dict()
        self.details["clipped"] = {key: figures[key] for key in keys}
        return self

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON object; a standard error that one replicate can't give is null."""
        return (
            self._texts_to_dict()
            | {
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
            }
            | self.details
        )

    def _texts_to_dict(self) -> dict[str, Any]:
        """What a report of texts says besides; the other figures are in bits/token."""
        if self.units.kind is not TOKENS:
            return {}
        scored = round(self.dimensions * self.num_images)
        each = self.units.bytes_per_value
        return {
            "bits_per_byte": self.bits_per_byte,
            "standard_error_per_byte": None if each is None else _finite(self.standard_error / each),
            "standard_error_over_images_per_byte": (
                None if each is None else _finite(self.standard_error_over_images / each)
            ),
            "bits_per_token": self.bits_per_dim,
            "perplexity": self.perplexity,
            "tokens": scored,
            "bytes": None if each is None else round(scored * each),
        }

    def __str__(self) -> str:
        sign = "<=" if self.is_bound else "="
        kind, value, data = self.units.kind, self.units.kind.value, self.units.kind.data
        given = " | ".join(["x", *filter(None, [self.details.get("condition")])])
        lines = [
            f"-log2 p({given}) / {value} {sign} {self.bits_per_dim:.4f} {kind.unit}   standard error "
            f"{_shown(self.standard_error, 'replicates')} (Monte Carlo), "
            f"{_shown(self.standard_error_over_images, data)} ({data})",
            *self._lines_of_texts(sign),
        ]
        width = max(16, *(len(name) + 2 for name in self.terms))
        lines += [f"  {name:<{width}}{value:>10.4f}" for name, value in self.terms.items()]
        lines.append(
            f"  {self.num_images} {data}, {self.replicates} replicates, {self.network_evaluations} network "
            f"evaluations, {self._time}"
        )
        lines += [
            f"  {line}"
            for line in (*_protocol_lines(self.details, is_bound=self.is_bound), *_target_lines(self.details))
        ]
        notes = [*_few_replicates(self.replicates), *self.details.get("notes", [])]
        return "\n".join(lines + [f"  note: {note}" for note in notes])

    def _lines_of_texts(self, sign: str) -> list[str]:
        """The lines on bytes and perplexity, of texts."""
        if self.units.kind is not TOKENS:
            return []
        each, scored, lines = self.units.bytes_per_value, round(self.dimensions * self.num_images), []
        if each is not None:
            lines.append(
                f"{'':<17}{sign} {self.bits_per_byte:.4f} bits/byte    standard error "
                f"{_shown(self.standard_error / each, 'replicates')} (Monte Carlo), "
                f"{_shown(self.standard_error_over_images / each, 'windows')} (windows)"
            )
        what = "" if each is None else f" for {round(scored * each):,} bytes"
        errors = (
            self.perplexity * math.log(2) * one for one in (self.standard_error, self.standard_error_over_images)
        )
        shown = "{} (Monte Carlo), {} (windows)".format(*map(_shown, errors, ("replicates", "windows")))
        return [
            *lines,
            f"{'':<17}{sign} {self.perplexity:.4f} perplexity   standard error {shown}",
            f"  {scored:,} tokens{what}",
        ]

    @property
    def _time(self) -> str:
        if hierarchy := self.details.get("hierarchy"):
            return f"{hierarchy['depth']} latent{'s' if hierarchy['depth'] > 1 else ''}"
        if "probability_flow" in self.details:
            return "probability-flow ODE"
        if (steps := self.details.get("steps")) is not None:
            return str(steps)
        return "continuous time" if self.transitions is None else f"{self.transitions} transitions"


_READ = ("resolution", "color", "image_column", "window_context")  # how data were read, where not as they are


def _protocol_lines(details: Mapping[str, Any], *, is_bound: bool) -> list[str]:
    """The lines on how it was measured, and of what."""
    lines = []
    if flow := details.get("probability_flow"):
        probes = "" if flow["divergence"] == "exact" else f" ({flow['probes']} {flow['divergence']} probes)"
        kind = "exact" if flow["divergence"] == "exact" else "Hutchinson"
        lines.append(
            f"ODE: {flow['solver']} in {flow['dtype']}, tolerance {flow['tolerance']:g}, {kind} divergence{probes}, "
            f"{flow['dequantization']} dequantisation, {flow['evaluations_per_solve']:.1f} evaluations a solve; its "
            f"numerical error: about {flow['numerical_error']:.1g} bits/dim"
        )
    if weights := details.get("importance_weights"):
        lines.append(
            f"importance weights: {weights['draws']} draws of {weights['over']}, effective sample size "
            f"{weights['effective_sample_size_mean']:.1f} on average"
        )
    if techniques := details.get("estimator"):
        used = [f"{name}" if value is True else f"{name} {value}" for name, value in techniques.items() if value]
        lines.append(f"estimator: {', '.join(word.replace('_', ' ') for word in used)}")
    if form := details.get("options", {}).get("decomposition"):
        lines.append(f"decomposition: {form.replace('_', ' ')}")
    if clipped := details.get("clipped"):
        lines.append(
            f"the same, every estimate of the data clipped as the sampler does: {clipped['bits_per_dim']:.4f} "
            f"bits/dim, standard error {_shown(_or_nan(clipped['standard_error']), 'replicates')}"
        )
    if marginal := details.get("marginal"):
        lines += _marginal_lines(marginal, str(details.get("condition", "class")), is_bound=is_bound)
    if dataset := details.get("dataset"):
        named = ", ".join(str(dataset[key]) for key in ("name", "config", "split") if dataset.get(key))
        read = (f"{key.replace('_', ' ')} {dataset[key]}" for key in _READ if dataset.get(key))
        values = f"{dataset['levels']} {'levels' if 'images' in dataset else 'tokens known'}"
        how = ", ".join([named, values, *read])
        lines.append(f"dataset: {how}, {str(dataset['fingerprint'])[:19]}...")
    return lines


def _marginal_lines(marginal: Mapping[str, Any], noun: str, *, is_bound: bool) -> list[str]:
    """The lines on what a label or a caption is worth, and on the mixture that it is compared with."""
    one, plural = ("a label", "classes") if noun == "class" else (f"a {noun}", f"{noun}s")
    count, prior = len(marginal["prior"]), "a uniform prior" if len(set(marginal["prior"])) == 1 else "the prior given"
    error = _or_nan(marginal["standard_error"])
    at_most = "at most " if is_bound and math.isfinite(error) else "about "  # the bias of one replicate is not known
    return [
        f"{one} is worth {marginal['gain_bits']:.4f} bits an image, of at most {marginal['most_bits']:.4f}; "
        f"standard error {_shown(error, 'replicates')} (Monte Carlo, with the bias of so few), "
        f"{_shown(_or_nan(marginal['standard_error_over_images']), 'images')} (images)",
        f"the mixture of {count} {plural}, by {prior}: {at_most}{marginal['mixture_bits']:.4f} bits an image",
    ]


def _target_lines(details: Mapping[str, Any]) -> list[str]:
    if not (target := details.get("target")):
        return []
    limit = target.get("ended_by", "max_replicates")
    reached = "reached" if target["reached"] else f"NOT REACHED within the budget: raise --{limit}"
    unit = f" {target['unit']}" if "unit" in target else ""
    return [f"target standard error {target['standard_error']:g}{unit}: {reached}"]


def _few_replicates(replicates: int) -> list[str]:
    """The words on what a standard error from so few numbers is worth."""
    if not 2 <= replicates < FEWEST_REPLICATES:
        return []
    share = 100 / math.sqrt(2 * (replicates - 1))
    return [
        f"the Monte Carlo error is itself uncertain by {share:.0f} %, as {replicates} replicates gave it: measure at "
        f"least {FEWEST_REPLICATES}."
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _shown(error: float, of: str) -> str:
    return f"{error:.4f}" if math.isfinite(error) else f"unknown: it needs 2 {of}"


def _standard_error(values: Tensor) -> float:
    if values.numel() < 2:
        return math.nan
    return float(values.std() / math.sqrt(values.numel()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
