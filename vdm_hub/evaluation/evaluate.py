"""The bits per dimension of a pipeline on a dataset: every image counts, the last partial batch too."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdm_hub.data.batches import evaluation_batches
from vdm_hub.data.examples import ABOUT_SITES, Examples
from vdm_hub.data.kinds import Units
from vdm_hub.errors import ConfigurationError, DataError, shortened
from vdm_hub.evaluation.conditions import Told, told_of
from vdm_hub.evaluation.journal import Journal, check_evaluation_journal
from vdm_hub.evaluation.measuring import ReplicateStages, measure_images
from vdm_hub.evaluation.processes import Processes
from vdm_hub.evaluation.provenance import component_configs, fingerprint, library_versions, weights_fingerprint
from vdm_hub.likelihood.marginal import MarginalMeasurement
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.methods import Method, build_measurement, method_of
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.variational_bound import Batch, Objective
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.version import __version__

_EXAMINED = 1024  # images, whose latents are looked at


def evaluate(
    pipeline: LikelihoodPipeline,
    images: Examples,
    method: Method | None = None,
    replicates: int | ReplicateStages = 8,
    *,
    batch_size: int = 256,
    seed: int = 0,
    max_images: int | None = None,
    progress: bool = True,
    dataset: Mapping[str, Any] | None = None,
    journal: Path | None = None,
    processes: Processes | None = None,
    marginal: bool = False,
    prior: Sequence[float] | None = None,
) -> LikelihoodReport:
    """The likelihood of every image, by any of the methods.

    Where the checkpoint's sampler clips its estimates of the data, the clipped model is measured too, on the same
    draws, and reported under ``clipped``, with the evaluations that it took.

    Args:
        pipeline: The model.
        images: The images, or other data, in memory or as a stream; their labels are given to a class-conditional
            network.
        method: What it is measured by, or its name; by default the pipeline's `default_method`.
        replicates: Independent passes over the images, behind the standard error; or `ReplicateStages`, with an error
            at which it ends, and a budget.
        batch_size: Images at once, at most; it changes no figure.
        seed: Of all draws.
        max_images: Only the first so many.
        progress: Whether to show a progress bar.
        dataset: What `vdm_hub.evaluation.provenance.describe_images` says of the images; the report repeats it, with
            the number and the fingerprint of those that were measured.
        journal: A folder that keeps what is finished; with the same folder, an evaluation that was killed goes on.
        processes: Those that share the images; this one is alone by default.
        marginal: Measure a conditional model under every class, or every caption of the images' dataset, on the same
            draws, and report the bound of the mixture, ``B_mix(x) = -log sum_c p(c) exp(-B_c(x))``, and the gain by a
            label, ``B_mix - B_c``, in bits an image, under ``marginal``. It takes as many times the evaluations as
            there are classes.
        prior: ``p(c)`` of the mixture; uniform by default.

    Returns:
        The report, the same on every process. Its ``details`` are the method's protocol, ``target`` (where one was
        asked for), ``seed``, ``weights`` (their fingerprint), ``dataset`` (where given), ``processes``, ``versions``
        of the libraries, ``device``, ``dtype`` of the network, ``seconds`` that it took, and ``seconds_before``, what
        a journal's images had taken.

    Raises:
        DataError: The images' shape, levels or labels are not the model's, or they are fewer than the processes.
        ConfigurationError: The model has no such likelihood, or a number is out of range.
        CheckpointError: The journal is that of another measurement, or damaged.
        NonFiniteLossError: A term of an image is NaN or infinite; the message names both.
    """
    started = time.perf_counter()
    processes = processes or Processes()
    if journal is not None:
        check_evaluation_journal(journal)
    _check_mixture(pipeline, marginal, prior)
    levels, numbers = read_images(images, batch_size, max_images)
    pipeline.check_data(levels, images.num_levels)
    told = told_of(pipeline, images, numbers)
    method = method_of(pipeline.default_method if method is None else method)
    mixture = told.mixture() if marginal and told is not None else None
    chances = None if mixture is None else mixture.prior(prior)
    stages = (
        replicates
        if isinstance(replicates, ReplicateStages)
        else ReplicateStages(replicates, max_replicates=max(256, replicates))
    )
    sites = {name: numbers[name] for name in ABOUT_SITES if name in numbers}
    units = images.units(len(levels))
    description = _describe(dataset, levels, units)
    weights = weights_fingerprint(pipeline)
    key = {
        "images": description["fingerprint"],
        "weights": weights,
        "labels": None if told is None else told.key,
    } | {name: fingerprint(known) for name, known in sites.items()}
    how = _How(pipeline, levels, sites, units, told, batch_size, key, journal, processes, progress)

    def one(objective: Objective, stages: ReplicateStages, model: str) -> LikelihoodReport:
        measurement = build_measurement(objective, len(levels), method, seed)
        if mixture is not None and chances is not None and model == "unclipped":
            measurement = MarginalMeasurement(measurement, mixture, chances)
        return how.measure(measurement, stages, model)

    report = one(pipeline.objective(method.transitions), stages, "unclipped")
    clipped = pipeline.clipped_objective(method.transitions)
    if clipped is not None:
        same = replace(stages, replicates=report.replicates, target=None)
        report = report.with_clipped(lambda: one(clipped, same, "clipped"))
    details, notes = pipeline.examine(levels[:_EXAMINED].to(pipeline.device_of_latents))
    report.details |= details
    report.with_notes([*pipeline.notes(method.transitions), *notes, *units.notes])
    report.details |= {"seed": seed, "weights": weights} | ({} if dataset is None else {"dataset": description})
    report.details |= {"processes": processes.count, "versions": library_versions()}
    report.details |= {
        "device": pipeline.device_of_latents.type,
        "dtype": str(pipeline.main_model.dtype).removeprefix("torch."),
    }
    report.details["seconds"] = round(time.perf_counter() - started, 3)
    return report


def _check_mixture(pipeline: LikelihoodPipeline, marginal: bool, prior: Sequence[float] | None) -> None:
    """Refuse a mixture that there can't be, before images are read."""
    if not marginal:
        if prior is not None:
            raise ConfigurationError(
                f"prior is {shortened(prior)}, and acts only with marginal: give both or neither."
            )
        return
    if pipeline.condition is None:
        raise ConfigurationError(
            "marginal asks for the mixture of all classes or captions, and the model is neither class-conditional nor "
            "told captions: leave it out."
        )
    if pipeline.class_condition is not None:
        pipeline.class_condition.choose().prior(prior)


@dataclass(frozen=True)
class _How:
    """The circumstances of an evaluation: images, batches, processes, and the journal's place."""

    pipeline: LikelihoodPipeline
    levels: Tensor
    sites: Mapping[str, Tensor]
    units: Units
    told: Told | None
    batch_size: int
    key: dict[str, Any]
    journal: Path | None
    processes: Processes
    progress: bool

    def measure(self, measurement: Measurement, stages: ReplicateStages, model: str) -> LikelihoodReport:
        """The report of a method on one model, the pipeline's own or the clipped one."""
        tells = isinstance(measurement, MarginalMeasurement)  # the network, by itself
        return measure_images(
            measurement,
            self.entries if tells else self.take,
            len(self.levels),
            stages,
            batch_size=self.batch_size,
            processes=self.processes,
            journal=self.open_journal(measurement, model),
            progress=self.progress,
            units=self.units,
        )

    def take(self, indices: Tensor) -> Batch:
        """The images with these indices and what the network is told of them, on the pipeline's device."""
        batch = self.entries(indices)
        return batch if self.told is None else self.told.condition.told(batch)

    def entries(self, indices: Tensor) -> Batch:
        """The images with these indices and the entries of their condition."""
        device = self.pipeline.device_of_latents
        batch = {"levels": self.levels[indices].to(device), "indices": indices}
        batch |= {name: known[indices].to(device) for name, known in self.sites.items()}
        if self.told is None:
            return batch
        return batch | {self.told.condition.entry: self.told.entries[indices].to(device)}

    def open_journal(self, measurement: Measurement, model: str) -> Journal | None:
        """The journal of a method on one model: the main process first, so that the others find what it has made."""
        if self.journal is None:
            return None
        # Not how many replicates, which may grow, nor batches and processes, which change nothing.
        key = self.key | {
            "vdm_hub": __version__,
            "model_config": self.pipeline.description(),
            "components": component_configs(self.pipeline),
            "method": measurement.method,
            "options": measurement.options,
            "protocol": measurement.protocol(),
            "seed": measurement.seed,
            "model": model,
        }
        place = self.journal / model
        made = self.processes.together(lambda: Journal(place, key).tidied() if self.processes.is_main else None)
        return made or Journal(place, key)


def _describe(dataset: Mapping[str, Any] | None, levels: Tensor, units: Units) -> dict[str, Any]:
    """The description of the images, with the number and the fingerprint of those that are measured."""
    data = units.kind.data
    known = dataset is not None and dataset[data] == len(levels)
    digest = dataset["fingerprint"] if dataset is not None and known else fingerprint(levels)
    return {**(dataset or {}), data: len(levels), "fingerprint": digest}


def read_images(images: Examples, batch_size: int, max_images: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The levels of the images, and what else is known of each, by its name."""
    needed = None if max_images is None else math.ceil(max_images / batch_size)
    parts = list(islice(evaluation_batches(images, batch_size), needed))
    if not parts:
        raise DataError(f"there are no {images.kind.data} to evaluate: name another split.")
    joined = {name: torch.cat([part[name] for part in parts])[:max_images] for name in parts[0]}
    return joined.pop("levels"), joined
