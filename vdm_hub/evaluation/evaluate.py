"""Bits per dimension of a pipeline on a dataset: every image counts, the last partial batch too."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub.data.batches import evaluation_batches
from vdm_hub.data.images import ImageLevels, ImageStream
from vdm_hub.errors import DataError
from vdm_hub.evaluation.provenance import fingerprint, library_versions, weights_fingerprint
from vdm_hub.likelihood.estimator import estimate_bound
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.variational_bound import Batch
from vdm_hub.pipeline_vdm import VDMPipeline


def evaluate(
    pipeline: VDMPipeline,
    images: ImageLevels | ImageStream,
    transitions: int | None = None,
    replicates: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    max_images: int | None = None,
    progress: bool = True,
    dataset: Mapping[str, Any] | None = None,
) -> LikelihoodReport:
    """The variational bound of every image.

    Args:
        pipeline: The model.
        images: The images, in memory or as a stream.
        transitions: T, or ``None`` for continuous time.
        replicates: Independent passes over the images, behind the standard error.
        batch_size: Images at once; it changes no figure.
        seed: Of all draws.
        max_images: Only the first so many.
        progress: Whether to show a progress bar.
        dataset: What `vdm_hub.evaluation.provenance.describe_images` says of the images; the report repeats it, with
            the number and the fingerprint of those that were measured.

    Returns:
        The report. Its ``details`` are ``seed``, ``weights`` (their fingerprint), ``dataset`` (where given),
        ``versions`` of the libraries, and ``seconds`` that it took.

    Raises:
        DataError: The images' shape or levels are not the model's.
    """
    started = time.perf_counter()
    process, objective = pipeline.process, pipeline.objective(transitions)
    needed = None if max_images is None else math.ceil(max_images / batch_size)
    parts = [batch["levels"] for batch in islice(evaluation_batches(images, batch_size), needed)]
    if not parts:
        raise DataError("there are no images to evaluate.")
    levels = torch.cat(parts)[:max_images]
    _check(pipeline, levels, process.num_levels)
    device = pipeline._execution_device

    def batches() -> Iterator[Batch]:
        for start in range(0, len(levels), batch_size):
            part = levels[start : start + batch_size]
            yield {"levels": part.to(device), "indices": torch.arange(start, start + len(part))}

    with tqdm(
        total=len(levels) * replicates, desc="evaluating", unit="image", disable=not progress, leave=False
    ) as bar:
        report = estimate_bound(objective, batches, len(levels), replicates, seed, bar.update)
    report.details |= {"seed": seed, "weights": weights_fingerprint(pipeline)}
    if dataset is not None:
        whole = dataset["images"] == len(levels)
        measured = {"images": len(levels), "fingerprint": dataset["fingerprint"] if whole else fingerprint(levels)}
        report.details["dataset"] = {**dataset, **measured}
    report.details |= {"versions": library_versions(), "seconds": round(time.perf_counter() - started, 3)}
    return report


def _check(pipeline: VDMPipeline, levels: Tensor, num_levels: int) -> None:
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    height, width = levels.shape[2:] if size is None else (size, size) if isinstance(size, int) else size
    if tuple(levels.shape[1:]) != (channels, height, width):
        raise DataError(
            f"the images are {'x'.join(map(str, levels.shape[1:]))}, the model's {channels}x{height}x{width}: "
            f"evaluate a dataset of that size and number of channels, or ask for resizing with --resolution {height}."
        )
    if int(levels.max()) >= num_levels:
        raise DataError(f"the images hold level {int(levels.max())}; the model knows 0 to {num_levels - 1}.")
