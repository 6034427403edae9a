"""`VDMPipeline.bits_per_dim` and `log_likelihood`: what is measured, in which precision, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from naming import naming
from tiny import LEVELS, sampled, tiny_pipeline, tiny_unet, tiny_unet_2d
from vdm_hub import VariationalBound
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.levels import images_from_levels
from vdm_hub.errors import ConfigurationError, DataError, NonFiniteLossError
from vdm_hub.evaluation.evaluate import evaluate

# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [tiny_unet, tiny_unet_2d])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_samples_and_is_measured(network: Callable[[], Any], dtype: torch.dtype) -> None:
    pipe = tiny_pipeline(network())
    images = sampled(pipe)
    exact = pipe.bits_per_dim(images)
    pipe.to(dtype)
    assert sampled(pipe).shape == images.shape
    rounded = pipe.bits_per_dim(images)
    assert math.isfinite(rounded.bits_per_dim)
    # Only the network rounds: the terms that do not call it keep every bit.
    for term in ("reconstruction", "prior"):
        assert torch.equal(rounded.terms_per_image[term], exact.terms_per_image[term])
    assert rounded.bits_per_dim == pytest.approx(exact.bits_per_dim, rel=0.05)


# ---- likelihood -----------------------------------------------------------------------------------------------------


def test_every_form_of_the_images_has_one_likelihood() -> None:
    pipe = tiny_pipeline()
    levels = torch.arange(2 * 64).reshape(2, 1, 8, 8) % LEVELS
    pt = levels.float() / (LEVELS - 1)
    forms = [levels, levels.to(torch.uint8), pt, pt.permute(0, 2, 3, 1).numpy(), images_from_levels(levels, 17, "pil")]
    reports = [pipe.bits_per_dim(form) for form in forms]
    assert all(torch.equal(report.per_image, reports[0].per_image) for report in reports)


def test_what_is_sampled_can_be_measured() -> None:
    pipe = tiny_pipeline(channels=3)
    per_image = [pipe.bits_per_dim(sampled(pipe, output_type=kind)).per_image for kind in ("pil", "np", "pt")]
    assert torch.equal(per_image[0], per_image[1]) and torch.equal(per_image[1], per_image[2])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 1, 8, 8), 0.51), (17,)),
        (torch.full((1, 1, 8, 8), 17), (17,)),
        (torch.zeros(1, 3, 8, 8), ("(3, 8, 8)",)),
        (torch.zeros(1, 1, 8, 9), ("(1, 8, 9)",)),
        (torch.zeros(1, 8, 8), ("(B, C, H, W)",)),
        (torch.zeros(0, 1, 8, 8), ("0 images",)),
    ],
)
def test_images_that_are_not_the_models_are_refused(images: Tensor, message: Any) -> None:
    with pytest.raises(DataError, match=naming(*message)):
        tiny_pipeline().bits_per_dim(images)


def test_the_seed_decides_the_estimate() -> None:
    pipe = tiny_pipeline()
    images = sampled(pipe)
    torch.manual_seed(1)
    one = pipe.bits_per_dim(images, seed=3)
    torch.manual_seed(2)
    assert torch.equal(one.per_image, pipe.bits_per_dim(images, seed=3).per_image)
    assert not torch.equal(one.per_image, pipe.bits_per_dim(images, seed=4).per_image)


def test_log_likelihood_is_bits_per_dim_in_nats() -> None:
    pipe = tiny_pipeline()
    images = sampled(pipe, 3)
    nats, bits = pipe.log_likelihood(images), pipe.bits_per_dim(images)
    assert nats.is_bound and nats.log_likelihood.shape == (3,)
    torch.testing.assert_close(-nats.log_likelihood / (64 * math.log(2)), bits.per_image)
    assert bits.bits_per_dim == pytest.approx(float(bits.per_image.mean()))
    assert bits.bits_per_dim == pytest.approx(sum(bits.terms.values()))
    assert set(bits.terms) == {"reconstruction", "prior", "diffusion"}
    with pytest.raises(ConfigurationError, match=naming("'odd'", "'ode'")):
        pipe.log_likelihood(images, method="odd")


def test_the_standard_error_is_that_of_the_replicates() -> None:
    report = tiny_pipeline().bits_per_dim(torch.zeros(2, 1, 8, 8), replicates=5)
    passes = sum(report.terms_per_image.values()).mean(1) / (64 * math.log(2))  # type: ignore[union-attr]
    assert passes.shape == (5,)
    assert report.standard_error == pytest.approx(float(passes.std()) / math.sqrt(5))
    one = tiny_pipeline().bits_per_dim(torch.zeros(2, 1, 8, 8), replicates=1)
    assert math.isnan(one.standard_error) and one.to_dict()["standard_error"] is None


@pytest.mark.parametrize(("transitions", "evaluations"), [(None, 6), (5, 6)])
def test_the_report_counts_what_was_done(transitions: int | None, evaluations: int) -> None:
    for pilot, more in ((0, {}), (256, {}), (512, {"times_per_datum": 2})):
        report = tiny_pipeline().bits_per_dim(
            torch.zeros(2, 1, 8, 8),
            VariationalBound(transitions, pilot_evaluations=pilot, **more),
            replicates=3,
        )
        counted = {"num_images": 2, "replicates": 3, "transitions": transitions}
        counted["network_evaluations"] = pilot + evaluations * (2 if more else 1)
        assert counted.items() <= report.to_dict().items()


def test_terms_do_not_depend_on_the_batches() -> None:
    """An image's draws are a function of the seed, the pass and its index among the images, also by `evaluate`."""
    pipe = tiny_pipeline()
    levels = torch.arange(6 * 64).reshape(6, 1, 8, 8) % LEVELS
    arguments: dict[str, Any] = {"replicates": 2, "seed": 1}
    whole = pipe.bits_per_dim(levels, **arguments).terms_per_image
    evaluated = evaluate(pipe, ImageLevels(levels.byte(), (1, 8, 8), LEVELS), progress=False, **arguments)
    for report in (pipe.bits_per_dim(levels, batch_size=4, **arguments), evaluated):
        for name, terms in report.terms_per_image.items():
            torch.testing.assert_close(terms, whole[name], rtol=1e-5, atol=1e-4)
    assert whole["diffusion"].flatten().unique().numel() == 12


def test_a_likelihood_leaves_the_networks_mode_alone() -> None:
    pipe = tiny_pipeline()
    images = sampled(pipe)
    pipe.bits_per_dim(images, replicates=1)
    assert not any(module.training for module in pipe.unet.modules())
    assert torch.equal(sampled(pipe), images)  # dropout would show
    pipe.unet.train()
    pipe.unet.conv_in.eval()
    report = pipe.bits_per_dim(images, replicates=1)
    assert pipe.unet.training and not pipe.unet.conv_in.training
    pipe.unet.eval()
    assert torch.equal(report.per_image, pipe.bits_per_dim(images, replicates=1).per_image)


def test_a_term_that_is_not_finite_names_its_image() -> None:
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=2))
    with torch.no_grad():
        pipe.unet.time_embedding.class_embedding[0].weight[1] = torch.nan
    with pytest.raises(NonFiniteLossError, match=naming("diffusion", "image 2")):
        pipe.bits_per_dim(torch.zeros(4, 1, 8, 8), class_labels=[0, 0, 1, 0])
