"""``pipe.classify``: the classes of a pipeline, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from naming import naming
from tiny import Inputs, tiny_pipeline, tiny_unet
from vdm_hub import ClassificationEffort, HVAEPipeline, MarkovianHVAE, VDMPipeline, VDMScheduler
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.likelihood.estimator import BoundEstimator

IMAGES = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
EQUAL = ClassificationEffort(budget=400, confidence=None)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(tiny_unet(num_class_embeds=4))


def test_candidates_by_number_or_name_are_told_the_network(pipe: Any) -> None:
    every = pipe.classify(IMAGES, effort=EQUAL)
    assert every.names == ("0", "1", "2", "3") and every.posterior.shape == (5, 4)
    some = pipe.classify(IMAGES, ["3", 1], effort=ClassificationEffort(budget=200, confidence=None))
    assert some.names == ("3", "1")
    effort = every.details["effort"] | {"budget": 200}
    assert some.details["effort"] == effort and some.details["seed"] == 0


@pytest.mark.parametrize("transitions", [None, 6])
def test_a_difference_is_that_of_the_likelihoods_of_two_labels(pipe: Any, transitions: int | None) -> None:
    report = pipe.classify(IMAGES, [0, 2], transitions=transitions, effort=EQUAL)
    objective = pipe.objective(transitions)
    estimator = BoundEstimator(objective, len(IMAGES), pilot_evaluations=0)
    totals = []
    with torch.no_grad():
        for label in (0, 2):
            batch = {"levels": IMAGES, "indices": torch.arange(5), "class_labels": torch.full((5,), label)}
            measured = [estimator.measure(batch, replicate).terms for replicate in range(60)]
            totals.append(torch.stack([torch.stack(list(terms.values())).sum(0) for terms in measured]))
    paired = totals[1] - totals[0]
    differences = report.standing.differences[:, 1] - report.standing.differences[:, 0]
    error = (paired.var(0) / len(paired) + report.standing.errors.amax(1) ** 2).sqrt()
    assert bool(((differences - paired.mean(0)).abs() < 4 * error).all())


def test_a_null_class_is_no_candidate() -> None:
    classes = {"count": 3, "names": ["cat", "dog", "eel"], "dropout": 0.1, "column": "kind"}
    pipe = VDMPipeline(tiny_unet(num_class_embeds=4), VDMScheduler(num_levels=17), classes=classes)
    assert pipe.classify(IMAGES, effort=ClassificationEffort(budget=30)).names == ("cat", "dog", "eel")
    with pytest.raises(ConfigurationError, match=naming("eels", "eel")):
        pipe.classify(IMAGES, ["cat", "eels"])


def test_labels_give_an_accuracy(pipe: Any) -> None:
    report = pipe.classify(IMAGES, effort=EQUAL, labels=[0, 1, 2, 3, 0])
    assert report.accuracy == float((report.predicted == torch.tensor([0, 1, 2, 3, 0])).double().mean())


def test_labels_are_looked_at_before_anything_is_evaluated(pipe: Any) -> None:
    inputs = Inputs(pipe.unet)
    for labels in ([0, 1, 2, 3, 4], ["0", "1", "2", "3", "boot"], [0]):
        with pytest.raises(DataError):
            pipe.classify(IMAGES, labels=labels, effort=EQUAL)
    assert inputs.samples == []


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="class-conditional"):
        tiny_pipeline().classify(IMAGES)
    hierarchy = HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(1, 8, 8)]))
    with pytest.raises(ConfigurationError, match="class-conditional"):
        hierarchy.classify(IMAGES)


@pytest.mark.parametrize(
    ("candidates", "value"),
    [
        *(([0, 4], "4"), ([0, -1], "-1"), (["0", "10"], "10"), ([0, True], "True"), ([0, 0.5], "0.5")),
        *(([2], "2"), ([], r"\[\]"), ([1, 1], "1"), ([1, "1"], "1")),
    ],
)
def test_candidates_that_are_none_are_refused_with_their_value(pipe: Any, candidates: list[Any], value: str) -> None:
    with pytest.raises(ConfigurationError, match=value):
        pipe.classify(IMAGES, candidates)


@pytest.mark.parametrize(
    "prior", [[0.5, 0.5], [[0.25] * 4], [1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], ["a"] * 4, [0.5, 0.7, -0.1, -0.1]]
)
def test_a_prior_that_is_none_is_refused(pipe: Any, prior: Any) -> None:
    with pytest.raises(ConfigurationError, match="prior"):
        pipe.classify(IMAGES, prior=prior)


def test_images_of_another_shape_are_refused(pipe: Any) -> None:
    with pytest.raises(DataError, match="8"):
        pipe.classify(torch.zeros(2, 1, 9, 9))
    with pytest.raises(DataError, match="0"):
        pipe.classify(torch.zeros(0, 1, 8, 8))
    with pytest.raises(DataError, match="labels"):
        pipe.classify(IMAGES, labels=[0], effort=ClassificationEffort(budget=8, pilot_evaluations=0))
