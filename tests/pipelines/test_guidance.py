"""Guidance: one formula in every sampler, nothing at scale 1, and no word of it in a likelihood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance, PerturbedAttentionGuidance

from naming import naming
from tiny import randomised, sampled, tiny_pipeline, tiny_unet
from vdm_hub import VDMPipeline
from vdm_hub.diffusion.samplers import SAMPLERS
from vdm_hub.errors import ConfigurationError
from vdm_hub.pipelines.guidance import GuidedNetwork, build_guider, guiders

CLASSES = {"count": 3, "names": ["shirt", "sandal", "sneaker"], "dropout": 0.1, "column": "label"}
LABELS = {"class_labels": ["sneaker", 0]}


def pipeline(**classes: Any) -> VDMPipeline:
    classes = CLASSES | classes
    unet = randomised(tiny_unet(num_class_embeds=3 + (classes["dropout"] > 0)))
    plain = tiny_pipeline(unet)
    pipe = VDMPipeline(unet, plain.scheduler, classes=classes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", ["ancestral", *SAMPLERS, DDIMScheduler, UniPCMultistepScheduler], ids=str)
def test_scale_1_is_no_guidance_and_others_guide_every_sampler(sampler: Any) -> None:
    pipe, how = pipeline(), {"sampler": sampler} if isinstance(sampler, str) else {}
    if not how:
        pipe.scheduler = pipe.scheduler.to_diffusers(sampler)
    how |= {"output_type": "latent"}
    plain = sampled(pipe, steps=6, **LABELS, **how)
    assert torch.equal(plain, sampled(pipe, steps=6, **LABELS, **how, guidance_scale=1))
    guided, more = (sampled(pipe, steps=6, **LABELS, **how, guidance_scale=scale) for scale in (2.0, 4.0))
    assert guided.isfinite().all() and more.isfinite().all()
    assert not torch.equal(guided, plain) and not torch.equal(guided, more)


@pytest.mark.parametrize("at_once", [True, False])
def test_it_is_the_formula_of_classifier_free_guidance(at_once: bool) -> None:
    network, sample = pipeline().unet.double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    told, untold = torch.tensor([2, 0]), torch.tensor([3, 3])
    time = torch.tensor([400.0, 700.0], dtype=torch.float64)
    guided = GuidedNetwork(network, {"class_labels": told}, {"class_labels": untold}, build_guider(guiders()[2], 2.5))
    guided._at_once = at_once
    guided.at_step(0, 1, time)
    with torch.no_grad():
        of_class, of_none = (network(sample, time, class_labels=labels)[0] for labels in (told, untold))
        torch.testing.assert_close(guided(sample, time), of_none + 2.5 * (of_class - of_none), rtol=0, atol=1e-12)


def test_scale_0_knows_nothing_of_the_class() -> None:
    pipe = pipeline()
    one, other = (sampled(pipe, class_labels=label, guidance_scale=0, output_type="latent") for label in (1, 2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", guiders())
def test_each_guider_that_applies_is_taken_by_name_or_refused(name: str) -> None:
    pipe = pipeline()
    try:
        images = sampled(pipe, **LABELS, guidance_scale=2.0, guider=name, output_type="latent")
    except ConfigurationError as error:
        assert name in str(error)
    else:
        assert images.isfinite().all()


def test_an_object_has_its_own_scale() -> None:
    pipe, own = pipeline(), ClassifierFreeGuidance(guidance_scale=3.0)
    named = sampled(pipe, **LABELS, guidance_scale=3.0)
    assert torch.equal(sampled(pipe, **LABELS, guider=own), named) and own._step is None


@pytest.mark.parametrize(
    ("classes", "arguments", "named"),
    [
        ({"dropout": 0.0}, {"guidance_scale": 2.0}, ("--condition_dropout",)),
        ({}, {"guidance_scale": -1}, ("guidance_scale", -1)),
        ({}, {"guidance_scale": math.nan}, ("guidance_scale", "nan")),
        ({}, {"guidance_scale": "2"}, ("guidance_scale", "2")),
        ({}, {"guidance_scale": 2.0, "guider": "ClasifierFreeGuidance"}, ("'ClassifierFreeGuidance'",)),
        ({}, {"guider": PerturbedAttentionGuidance(perturbed_guidance_layers=[0])}, ("PerturbedAttentionGuidance",)),
        ({}, {"guidance_scale": 2.0, "guider": ClassifierFreeGuidance()}, ("guidance_scale", "2.0")),
        ({}, {"guider": guiders()[0]}, (guiders()[0], "guidance_scale")),
        ({}, {"class_labels": ["sneker", 0]}, ("'sneaker'",)),
        ({}, {"class_labels": ["sneaker", [0]]}, ("class_labels",)),
    ],
)
def test_what_can_not_be_guided_is_refused(classes: Any, arguments: Any, named: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*named)):
        sampled(pipeline(**classes), **LABELS | arguments)


def test_a_model_without_a_condition_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="condition"):
        sampled(tiny_pipeline(), guidance_scale=2.0)


def test_as_many_images_as_labels_and_one_label_for_all() -> None:
    pipe = pipeline()
    assert len(pipe(**LABELS, num_inference_steps=2, output_type="pt").images) == 2
    assert len(pipe(3, class_labels="sandal", num_inference_steps=2, output_type="pt").images) == 3
    for labels in (np.array([2, 0]), range(2), torch.tensor([2, 0])):
        assert len(pipe(class_labels=labels, num_inference_steps=2, output_type="pt").images) == 2
    by_name, by_number = (sampled(pipe, class_labels=label) for label in ("sandal", 1))
    assert torch.equal(by_name, by_number)


def test_a_likelihood_is_of_the_class_and_says_so() -> None:
    pipe, images = pipeline(), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    report = pipe.bits_per_dim(images, class_labels=["sandal", 2], replicates=2)
    assert report.details["condition"] == "class" and "p(x | class)" in str(report)
    with pytest.raises(ConfigurationError, match=naming("guidance_scale")):
        pipe.bits_per_dim(images, **LABELS, guidance_scale=2.0)


@pytest.mark.parametrize("argument", [{"guidance_scale": 2.0}, {"guider": "ClassifierFreeGuidance"}])
def test_a_likelihood_is_never_guided(argument: dict[str, Any]) -> None:
    pipe = pipeline()
    levels = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    with pytest.raises(ConfigurationError, match="without guidance"):
        pipe.bits_per_dim(levels, **LABELS, **argument)
    assert any(
        "without guidance" in note for note in pipe.bits_per_dim(levels, replicates=1, **LABELS).details["notes"]
    )


def test_classes_that_are_not_the_networks_are_refused() -> None:
    unet, scheduler = tiny_unet(num_class_embeds=4), tiny_pipeline().scheduler
    with pytest.raises(ConfigurationError, match=naming("classes", 5)):
        VDMPipeline(unet, scheduler, classes=CLASSES | {"count": 5, "names": None})
