"""The classes or captions of a dataset's images by a pipeline's bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vdm_hub.data.captions import CAPTIONS
from vdm_hub.data.images import ImageLevels, ImageStream
from vdm_hub.errors import shortened
from vdm_hub.evaluation.conditions import different, names_of
from vdm_hub.evaluation.evaluate import read_images
from vdm_hub.evaluation.provenance import library_versions, weights_fingerprint
from vdm_hub.likelihood.classification_report import ClassificationReport
from vdm_hub.likelihood.protocol import ClassificationEffort
from vdm_hub.pipelines.base import LikelihoodPipeline


def classify_images(
    pipeline: LikelihoodPipeline,
    images: ImageLevels | ImageStream,
    effort: ClassificationEffort | None = None,
    *,
    candidates: Sequence[int | str] | None = None,
    prior: Sequence[float] | None = None,
    transitions: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    max_images: int | None = None,
    dataset: Mapping[str, Any] | None = None,
    must_be_candidates: bool = True,
) -> ClassificationReport:
    """The class or the caption of every image, and, where they have their own, how often it is that.

    Args:
        pipeline: A model that is told classes or captions.
        images: The images, in memory or as a stream.
        effort: See `LikelihoodPipeline.classify`, as the next five.
        candidates: All classes by default, or the captions of the images' dataset.
        prior: ``p(c)`` of the candidates; uniform by default.
        transitions: T; continuous time by default.
        seed: Of all draws.
        batch_size: Pairs of an image and a class at once; it changes no figure.
        max_images: Only the first so many.
        dataset: What is known of the images; the report repeats it.
        must_be_candidates: Refuse images whose own class or caption is no candidate; else it is left out, for all
            images, and a note says so.

    Raises:
        DataError: The images' shape, levels or labels are not the model's.
        ConfigurationError: The network is told nothing of an image, there are fewer than two candidates or, where they
            are not given, very many captions; or a number is out of range.
    """
    started = time.perf_counter()
    levels, known = read_images(images, batch_size, max_images)
    pipeline.check_data(levels, images.num_levels)
    labels, notes = names_of(pipeline, images, known), list[str]()
    if candidates is None and images.captions is not None:
        candidates = different(images.captions.texts, known[CAPTIONS])
    elif candidates is not None and not must_be_candidates:
        labels, notes = _among(labels, pipeline.known_condition.choose(candidates).names)
    options: dict[str, Any] = {"effort": effort, "prior": prior, "transitions": transitions}
    report = pipeline.classify(levels, candidates, labels=labels, seed=seed, batch_size=batch_size, **options)
    if notes:
        report.details["notes"] = notes
    report.details["weights"] = weights_fingerprint(pipeline)
    if dataset is not None:
        report.details["dataset"] = dict(dataset)
    device, kind = pipeline.device_of_latents.type, str(pipeline.main_model.dtype).removeprefix("torch.")
    report.details.update(device=device, dtype=kind, versions=library_versions())
    report.details["seconds"] = round(time.perf_counter() - started, 3)
    return report


def _among(labels: list[str] | None, names: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """What the images are, where all of them are candidates, and what to say where one is not."""
    other = [(image, one) for image, one in enumerate(labels or ()) if one not in names]
    if not other:
        return labels, []
    image, one = other[0]
    return None, [
        f"{len(other)} images are none of the candidates (image {image} is {shortened(one)}), so that it is not known "
        f"how many were found"
    ]
