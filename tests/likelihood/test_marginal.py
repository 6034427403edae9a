"""The bound of the mixture of classes: what a label gains is never above its own surprise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import randomised, tiny_pipeline, tiny_unet
from tiny_text import LIMIT, WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import VariationalBound, VDMPipeline
from vdm_hub.commands import main
from vdm_hub.data.images import captioned
from vdm_hub.data.loading import load_split
from vdm_hub.errors import ConfigurationError, NonFiniteLossError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.hub.records import read_evaluation
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.marginal import MarginalMeasurement, gain_bits, marginal_figures, mixture
from vdm_hub.likelihood.measurement import collect
from vdm_hub.likelihood.report import _marginal_lines

IMAGES = load_split("digits", "test[:12]", num_levels=17, label_column="label")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(tiny_unet(num_class_embeds=10))


@given(st.integers(2, 6), st.integers(0, 10**6), st.floats(0.1, 1e4))
def test_a_gain_is_at_most_the_label_s_surprise_and_the_mixture_within_its_bounds(
    classes: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bounds = 100 + scale * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    prior = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.01
    prior, labels = prior / prior.sum(), torch.randint(classes, (5,), generator=generator)
    assert bool((gain_bits(bounds, labels, prior) <= -prior[labels].log2() + 1e-6).all())
    best = (bounds - prior.log()).amin(1)
    mixed = mixture(bounds, prior)
    assert bool((mixed <= best + 1e-9).all()) and bool((mixed >= best - math.log(classes) - 1e-9).all())


def test_classes_that_say_the_same_gain_nothing() -> None:
    bounds, prior = torch.full((3, 4, 5), 7.0).double(), torch.full((5,), 0.2, dtype=torch.float64)
    figures = marginal_figures(bounds, torch.zeros(4).long(), prior)
    assert figures["gain_bits"] == pytest.approx(0, abs=1e-9) and figures["mixture_bits"] == pytest.approx(
        7 / math.log(2)
    )


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_bound_that_is_none_is_refused_with_its_image(wrong: float) -> None:
    bounds, prior = torch.ones(2, 3).double(), torch.full((3,), 1 / 3).double()
    bounds[1, 0] = wrong
    with pytest.raises(NonFiniteLossError, match="image 1"):
        gain_bits(bounds, torch.zeros(2).long(), prior)


def test_the_jackknife_takes_out_the_bias_of_few_replicates() -> None:
    """Two classes of equal bounds, with noise of their own: the mixture of estimates lies below that of the truth."""
    generator = torch.Generator().manual_seed(0)
    prior, labels, found, left_as_it_is = torch.tensor([0.5, 0.5]).double(), torch.zeros(20).long(), [], []
    for _ in range(200):
        bounds = 50 + torch.randn(8, 20, 2, generator=generator, dtype=torch.float64)
        found.append(marginal_figures(bounds, labels, prior))
        left_as_it_is.append(float(gain_bits(bounds.mean(0), labels, prior).mean()))
    gains = torch.tensor([one["gain_bits"] for one in found])  # the truth is 0
    errors = torch.tensor([one["standard_error"] for one in found])
    assert abs(float(gains.mean())) < abs(sum(left_as_it_is) / 200) / 4
    assert float((gains.abs() <= 2 * errors).double().mean()) >= 0.9 and float(errors.mean()) < 2 * float(gains.std())


@pytest.mark.parametrize(("replicates", "images"), [(2, 1), (4, 2), (4, 3), (1, 3)])
def test_every_figure_of_a_mixture_is_its_formula(replicates: int, images: int) -> None:
    """Gain, jackknife's bias and error (Efron, The Jackknife, 1982, ch. 2), written out in numpy."""
    generator = torch.Generator().manual_seed(replicates)
    bounds = 5 + torch.randn(replicates, images, 3, generator=generator, dtype=torch.float64)
    prior, labels = torch.tensor([0.2, 0.5, 0.3]).double(), torch.arange(images) % 3
    figures = marginal_figures(bounds, labels, prior)

    def gains(of: Any) -> Any:
        mixed = -np.log((prior.numpy() * np.exp(-of)).sum(1))
        return (mixed - of[np.arange(images), labels.numpy()]) / math.log(2)

    drawn = bounds.numpy()
    each = gains(drawn.mean(0))
    spread = each.std(ddof=1) / math.sqrt(images) if images > 1 else None
    assert figures["standard_error_over_images"] == (None if spread is None else pytest.approx(spread, rel=1e-9))
    gain = each.mean()
    if replicates > 1:
        left_out = np.array([gains(np.delete(drawn, i, 0).mean(0)).mean() for i in range(replicates)])
        bias = (replicates - 1) * (left_out.mean() - gain)
        error = math.sqrt((replicates - 1) / replicates * ((left_out - left_out.mean()) ** 2).sum())
        assert figures["monte_carlo_bias"] == pytest.approx(bias, rel=1e-9)
        assert figures["standard_error"] == pytest.approx(math.hypot(error, bias), rel=1e-9)
        gain = min(gain - bias, figures["most_bits"])
    else:
        assert figures["standard_error"] is None and figures["monte_carlo_bias"] is None
    assert figures["gain_bits"] == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize("replicates", [2, 3, 8, 64])
def test_a_gain_of_whatever_noise_stays_at_the_law_and_its_error_reaches_the_truth(replicates: int) -> None:
    """Ten classes two nats apart, each with noise of its own of up to eight nats: the truth is 3.084 bits of 3.322."""
    generator, prior = torch.Generator().manual_seed(1), torch.full((10,), 0.1).double()
    truth = float(gain_bits(2.0 * torch.arange(10).double()[None], torch.tensor([0]), prior))
    for noise in (0.5, 2, 8):
        drawn = torch.randn(replicates, 50, 10, generator=generator, dtype=torch.float64)
        figures = marginal_figures(2 * torch.arange(10) + noise * drawn, torch.zeros(50).long(), prior)
        assert figures["gain_bits"] <= figures["most_bits"]
        assert abs(figures["gain_bits"] - truth) <= 4 * figures["standard_error"]


def test_what_is_reported_of_the_own_class_is_what_it_is_without_the_mixture(pipe: Any) -> None:
    plain = evaluate(pipe, IMAGES, replicates=3, progress=False)
    report = evaluate(pipe, IMAGES, replicates=3, progress=False, marginal=True)
    for name, term in plain.terms_per_image.items():
        torch.testing.assert_close(report.terms_per_image[name], term, rtol=1e-5, atol=1e-5)
    pilot = 256
    assert report.network_evaluations - pilot == 10 * (plain.network_evaluations - pilot)
    figures = report.to_dict()["marginal"]
    own = report.bits_per_dim * report.dimensions
    assert figures["mixture_bits"] - figures["gain_bits"] == pytest.approx(own, rel=1e-9)
    assert figures["most_bits"] == pytest.approx(math.log2(10))


def test_every_class_is_measured_on_the_same_draws(pipe: Any) -> None:
    inner = BoundEstimator(pipe.objective(), len(IMAGES.levels), pilot_evaluations=0)
    candidates = pipe.known_condition.choose()
    one = MarginalMeasurement(inner, candidates, candidates.prior())
    batch = {"levels": torch.as_tensor(IMAGES.levels), "indices": torch.arange(12), "class_labels": IMAGES.labels}
    with torch.no_grad():
        found = one.measure(batch, 1)
        for label in range(10):
            told = inner.measure(batch | {"class_labels": torch.full((12,), label)}, 1)
            assert torch.equal(found.diagnostics["by_class"][:, label], torch.stack([*told.terms.values()]).sum(0))
            assert torch.equal(found.diagnostics["time"], told.diagnostics["time"])


def test_its_pilot_is_that_of_the_method_and_its_evaluations_are_foretold(pipe: Any) -> None:
    candidates = pipe.known_condition.choose()

    def made() -> MarginalMeasurement:
        inner = BoundEstimator(pipe.objective(), len(IMAGES.levels), pilot_evaluations=256)
        return MarginalMeasurement(inner, candidates, candidates.prior())

    batch = {"levels": torch.as_tensor(IMAGES.levels), "indices": torch.arange(12), "class_labels": IMAGES.labels}
    one, other = made(), made()
    report = collect(one, lambda: [batch], 12, 2)
    assert one.fewest_evaluations(2) == report.network_evaluations == 256 + 10 * 2 * 12
    other.load_state(one.state())
    with torch.no_grad():
        found = [each.measure(batch, 0).terms["diffusion"] for each in (one, other)]
    assert torch.equal(*found)


def test_the_mixture_of_captions_is_that_of_what_the_images_are_told() -> None:
    """The same captions as texts of a prompt: every one of them measured by itself."""
    captions = {"column": "label", "template": "a {label}", "max_length": LIMIT, "dropout": 0.0, "examples": []}
    parts: Any = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer(), "captions": captions}
    pipe: Any = VDMPipeline(randomised(tiny_unet(cross_attention_dim=WIDTH)), tiny_pipeline().scheduler, **parts)
    images = captioned(replace(IMAGES, class_names=tuple("abcdefghij")), "a {label}")
    even = VariationalBound(pilot_evaluations=0)  # a pilot would choose other times for other captions
    plain = evaluate(pipe, images, even, replicates=1, progress=False)
    report = evaluate(pipe, images, even, replicates=1, progress=False, marginal=True)
    torch.testing.assert_close(report.per_image, plain.per_image, rtol=1e-5, atol=1e-5)
    assert images.captions is not None
    texts = images.captions.texts[1:]  # of every class, whether or not an image has it
    one_each = [pipe.log_likelihood(images.levels, even, replicates=1, prompt=text) for text in texts]
    bounds = torch.stack([-one.log_likelihood.double() for one in one_each], 1)
    mixed = mixture(bounds, torch.full((len(texts),), 1 / len(texts)).double()).mean() / math.log(2)
    found = report.to_dict()["marginal"]
    assert found["mixture_bits"] == pytest.approx(float(mixed), rel=1e-6)  # float32 sums in other batches
    assert found["gain_bits"] <= found["most_bits"] == pytest.approx(math.log2(len(texts)))


def test_only_a_class_conditional_model_has_a_mixture(pipe: Any) -> None:
    with pytest.raises(ConfigurationError, match="class-conditional"):
        evaluate(tiny_pipeline(), IMAGES, progress=False, marginal=True)
    with pytest.raises(ConfigurationError, match="marginal"):
        evaluate(pipe, IMAGES, progress=False, prior=[0.1] * 10)
    with pytest.raises(ConfigurationError, match="prior"):
        evaluate(pipe, IMAGES, progress=False, marginal=True, prior=[0.1])


def test_the_command_reports_the_gain_as_a_publication_reads_it_and_a_journal_keeps_it(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "pipeline")
    words = ["evaluate", str(tmp_path / "pipeline"), "--dataset_name", "digits", "--label_column", "label"]
    words += ["--max_images", "6", "--replicates", "2", "--journal", str(tmp_path / "journal")]
    printed = []
    for _ in range(2):  # the second time from the journal
        assert main([*words, "--marginal", "--json"]) == 0
        printed.append(capsys.readouterr().out)
    (tmp_path / "evaluation.json").write_text(printed[0])
    figures = read_evaluation(tmp_path / "evaluation.json")
    assert figures["marginal"] == json.loads(printed[1])["marginal"] and figures["marginal"]["prior"] == [0.1] * 10
    assert main([*words[:-2], "--marginal"]) == 0 and "a label is worth" in capsys.readouterr().out
    assert main([*words, "--prior", "0.5,0.5"]) == 2 and "--marginal" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "word"), [(0.01, "at most 9"), (None, "about 9")])
def test_a_mixture_whose_bias_is_not_known_is_no_bound(error: float | None, word: str) -> None:
    marginal = {"gain_bits": 1.0, "most_bits": 2.0, "mixture_bits": 9.0, "prior": [0.5, 0.5], "monte_carlo_bias": 0.0}
    errors = {"standard_error": error, "standard_error_over_images": 0.1}
    assert word in _marginal_lines(marginal | errors, "class", is_bound=True)[-1]
