"""Every figure of a report against its formula, written out in numpy; and what is said of it, by what it names."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm_hub.data.kinds import TOKENS, Units
from vdm_hub.errors import DataError
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.stages import FEWEST_REPLICATES

TERMS = ("prior", "reconstruction", "diffusion")


def report(replicates: int, images: int, dimensions: int = 5, seed: int = 0, **others: Any) -> LikelihoodReport:
    generator = torch.Generator().manual_seed(seed)
    scale = {"prior": 0.1, "reconstruction": 1.0, "diffusion": 7.0}
    terms = {
        name: scale[name] * torch.randn(replicates, images, generator=generator, dtype=torch.float64).exp()
        for name in TERMS
    }
    return LikelihoodReport(terms, None, dimensions, **others)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4000), st.integers(0, 99))
def test_every_figure_is_its_formula(replicates: int, images: int, dimensions: int, seed: int) -> None:
    measured = report(replicates, images, dimensions, seed)
    nats = {name: term.numpy() for name, term in measured.terms_per_image.items()}
    total = sum(nats.values())
    bits = total / dimensions / math.log(2)

    def error(values: Any) -> float:
        count = len(values)
        if count == 1:
            return math.nan
        return math.sqrt(sum((values - values.mean()) ** 2) / (count - 1) / count)

    near = {"rel": 1e-9, "nan_ok": True}
    assert (measured.num_images, measured.replicates, measured.dimensions) == (images, replicates, dimensions)
    assert measured.bits_per_dim == pytest.approx(bits.mean(), rel=1e-12)
    assert measured.per_image.tolist() == pytest.approx(bits.mean(0).tolist(), rel=1e-12)
    assert measured.log_likelihood.tolist() == pytest.approx((-total.mean(0)).tolist(), rel=1e-12)
    assert measured.standard_error == pytest.approx(error(bits.mean(1)), **near)
    assert measured.standard_error_over_images == pytest.approx(error(bits.mean(0)), **near)
    by_image = [error(bits[:, i]) for i in range(images)]
    assert measured.standard_error_per_image.tolist() == pytest.approx(by_image, **near)
    assert measured.standard_error_per_image.dtype == torch.float64
    for name, x in nats.items():
        each = x.mean(0) / dimensions / math.log(2)
        assert measured.terms_of_each[name].tolist() == pytest.approx(each.tolist(), rel=1e-12)
    assert measured.terms_of_each.keys() == nats.keys()
    assert measured.terms == pytest.approx({name: x.mean() / dimensions / math.log(2) for name, x in nats.items()})
    written = measured.to_dict()
    assert written["bits_per_dim"] == measured.bits_per_dim and written["terms"] == measured.terms
    for name in ("standard_error", "standard_error_over_images"):
        value = getattr(measured, name)
        assert written[name] == (None if math.isnan(value) else value)
    for name in ("num_images", "replicates", "dimensions", "transitions", "network_evaluations", "is_bound", "method"):
        assert written[name] == getattr(measured, name)
    json.dumps(written, allow_nan=False)


@pytest.mark.parametrize("replicates", [1, 3])
def test_what_draws_nothing_has_no_monte_carlo_error(replicates: int) -> None:
    measured = report(replicates, 4, is_deterministic=True)
    each = measured.standard_error_per_image
    assert measured.standard_error == 0.0 and each.tolist() == [0.0] * 4 and each.dtype == torch.float64
    assert measured.standard_error_over_images == report(replicates, 4).standard_error_over_images


@given(st.integers(2, 9), st.integers(0, 99))
def test_data_of_different_sizes_have_the_error_of_a_ratio(images: int, seed: int) -> None:
    """Of sums over sums: the residual of each is its bits less those expected of so many values, over the mean."""
    each = torch.randint(1, 90, (images,), generator=torch.Generator().manual_seed(seed))
    mean = float(each.double().mean())
    units = Units(TOKENS, per_datum=mean, each=each)
    measured = report(3, images, seed=seed, units=units)
    measured = LikelihoodReport(measured.terms_per_image, None, mean, units=units)
    bits = -measured.log_likelihood.numpy() / math.log(2)
    residuals = (bits - bits.sum() / each.numpy().sum() * each.numpy()) / mean
    expected = math.sqrt((residuals**2).sum() / (images - 1) / images)
    assert measured.standard_error_over_images == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("by_byte", [2.5, None])
@pytest.mark.parametrize("replicates", [1, FEWEST_REPLICATES])
def test_a_report_of_texts_says_the_same_by_token_by_byte_and_as_a_perplexity(
    by_byte: float | None, replicates: int
) -> None:
    units = Units(TOKENS, per_datum=12.5, bytes_per_value=by_byte)
    measured = report(replicates, 4, units=units)
    measured = LikelihoodReport(measured.terms_per_image, None, 12.5, units=units)
    written, text = measured.to_dict(), str(measured)
    bits, over_data = measured.bits_per_dim, measured.standard_error_over_images
    error = measured.standard_error if replicates > 1 else None
    assert written["bits_per_token"] == written["bits_per_dim"] == bits
    assert written["perplexity"] == measured.perplexity == pytest.approx(math.exp(bits * math.log(2)), rel=1e-12)
    assert written["tokens"] == 50 and "50 tokens" in text
    # Of a perplexity 2^b, to first order: its derivative in b times the error of b.
    slope = math.log(2) * 2**bits
    (line,) = (line for line in text.splitlines() if "perplexity" in line)
    assert f"{2**bits:.4f}" in line and f"{slope * over_data:.4f} (windows)" in line
    assert ("unknown" if error is None else f"{slope * error:.4f} (Monte Carlo)") in line
    names = ("bits_per_byte", "standard_error_per_byte", "standard_error_over_images_per_byte", "bytes")
    if by_byte is None:
        assert [written[name] for name in names] == [None] * 4 and "byte" not in text
        assert measured.bits_per_byte is None and (error is None or measured.leading_error == error)
        return
    expected = [bits / 2.5, None if error is None else error / 2.5, over_data / 2.5, 125]
    assert [written[name] for name in names] == expected and "125 bytes" in text
    (line,) = (line for line in text.splitlines() if "bits/byte" in line)
    assert f"{bits / 2.5:.4f}" in line and f"{over_data / 2.5:.4f} (windows)" in line
    assert ("unknown" if error is None else f"{error / 2.5:.4f} (Monte Carlo)") in line


def test_images_have_no_figure_by_token_or_byte() -> None:
    measured = report(3, 2)
    assert not {"bits_per_token", "bits_per_byte", "perplexity", "tokens"} & measured.to_dict().keys()
    assert measured.bits_per_byte is None and "perplexity" not in str(measured)


@pytest.mark.parametrize(("is_bound", "replicates"), [(True, 3), (False, 1)])
def test_the_table_has_a_row_of_figures_for_each_image(is_bound: bool, replicates: int) -> None:
    measured = report(replicates, 2, is_bound=is_bound)
    head, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.table().splitlines()]
    assert head == ["image", "bits/dim", "bits in all", *TERMS] and rule == ["---"] * 6
    assert len(rows) == 2
    for i, (number, bits, total, *terms) in enumerate(rows):
        assert number == str(i + 1) and bits.startswith("at most ") == total.startswith("at most ") == is_bound
        assert f"**{measured.per_image[i]:.3f}**" in bits
        error = float(measured.standard_error_per_image[i])
        assert ("unknown" if math.isnan(error) else f"± {error:.4f}") in bits
        assert total.endswith(f"{float(measured.per_image[i]) * measured.dimensions:.1f}")
        assert terms == [f"{float(measured.terms_of_each[name][i]):.3f}" for name in TERMS]


def test_the_two_standard_errors_are_those_of_what_they_name() -> None:
    """Of 400 sets of draws from known distributions, the errors that came true."""
    generator = np.random.default_rng(0)
    images, replicates, between, within = 40, 9, 3.0, 1.0
    off, over_images, monte_carlo, spread = [], [], [], []
    for _ in range(400):
        true = generator.normal(0, between, images)
        drawn = true + generator.normal(0, within, (replicates, images))
        measured = LikelihoodReport({"diffusion": torch.from_numpy(drawn * math.log(2))}, None, 1)
        off.append(measured.bits_per_dim - true.mean())
        spread.append(measured.bits_per_dim)
        monte_carlo.append(measured.standard_error)
        over_images.append(measured.standard_error_over_images)
    # 400 draws give a standard deviation to 3.5 %; four times that.
    assert np.std(off) == pytest.approx(math.sqrt(np.square(monte_carlo).mean()), rel=0.14)
    assert np.std(spread) == pytest.approx(math.sqrt(np.square(over_images).mean()), rel=0.14)


def test_defaults_are_those_of_a_bound_without_a_protocol() -> None:
    plain = LikelihoodReport({"diffusion": torch.ones(2, 3, dtype=torch.float64)}, None, 4)
    assert "notes" not in plain.with_notes([]).details
    assert plain.is_bound and plain.reached and plain.network_evaluations == 0 and plain.transitions is None


@pytest.mark.parametrize("reached", [True, False])
def test_a_target_is_reached_or_not_and_the_text_says_which_option_to_raise(reached: bool) -> None:
    target = {"standard_error": 0.01, "reached": reached, "ended_by": "max_time"}
    measured = report(3, 2, details={"target": target})
    assert measured.reached == reached
    assert ("--max_time" in str(measured)) == (not reached) and "0.01" in str(measured)
    assert "target" not in str(report(3, 2))
    del target["ended_by"]
    assert ("--max_replicates" in str(measured)) == (not reached)


@pytest.mark.parametrize("replicates", range(1, FEWEST_REPLICATES + 1))
def test_few_replicates_are_said_with_what_their_error_is_worth(replicates: int) -> None:
    text = str(report(replicates, 3))
    notes = [line for line in text.splitlines() if line.startswith("  note: ")]
    if 2 <= replicates < FEWEST_REPLICATES:
        (note,) = notes
        # Of a normal variable: the standard deviation of s over s is 1 / sqrt(2 (n - 1)).
        assert f" {100 / math.sqrt(2 * replicates - 2):.0f} %" in note and str(FEWEST_REPLICATES) in note
    else:
        assert not notes
    assert ("unknown" in text) == (replicates == 1)


def test_the_text_holds_every_figure() -> None:
    measured = report(FEWEST_REPLICATES, 4, network_evaluations=123, is_bound=False).with_notes(["one", "two"])
    lines = str(measured.with_notes(["three"]).with_notes([])).splitlines()
    assert f"= {measured.bits_per_dim:.4f}" in lines[0] and "<=" not in lines[0] and "<=" in str(report(2, 2))
    assert f"{measured.standard_error:.4f}" in lines[0] and f"{measured.standard_error_over_images:.4f}" in lines[0]
    for line, (name, value) in zip(lines[1:4], measured.terms.items(), strict=True):
        assert line.split() == [name, f"{value:.4f}"]
    assert {"4", str(FEWEST_REPLICATES), "123"} <= set(lines[4].split())
    assert [line.removeprefix("  note: ") for line in lines[5:]] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "continuous"),
        ({"transitions": 7}, "7 transitions"),
        ({"transitions": 7, "method": "importance"}, "7 transitions"),
        ({"method": "odd"}, "continuous"),
        ({"details": {"hierarchy": {"depth": 1}}}, "1 latent"),
        ({"details": {"hierarchy": {"depth": 2}}}, "2 latents"),
        ({"details": {"steps": "steps of one site"}}, "steps of one site"),
    ],
)
def test_its_time_is_named(fields: dict[str, Any], said: str) -> None:
    (line,) = (line for line in str(report(2, 2, **fields)).splitlines() if " replicates, " in line)
    assert line.endswith(said) or (said == "continuous" and said in line)


FLOW = {"solver": "dopri5", "tolerance": 1e-5, "dequantization": "uniform", "evaluations_per_solve": 44.25}
FLOW |= {"dtype": "float64", "numerical_error": 3e-7}


def test_the_protocol_is_in_the_text() -> None:
    details = {
        "probability_flow": FLOW | {"divergence": "rademacher", "probes": 3},
        "importance_weights": {"draws": 17, "over": "the noise", "effective_sample_size_mean": 2.26},
        "estimator": {"stratified": True, "pilot": 64, "unused": False},
        "options": {"decomposition": "consistency_form"},
        "clipped": {"bits_per_dim": 2.5, "standard_error": 0.125},
        "dataset": {"name": "digits", "split": "test", "levels": 17, "fingerprint": "sha256:" + "ab" * 32}
        | {"resolution": 31, "config": None},
    }
    text = str(report(FEWEST_REPLICATES, 2, details=details))
    assert "probability-flow ODE" in text.splitlines()[4]
    for word in (
        "dopri5",
        "float64",
        "3e-07",
        "1e-05",
        "3 rademacher",
        "44.2",
        "17 draws",
        "2.3",
        "2.5000",
        "0.1250",
        "digits",
        "31",
    ):
        assert word in text
    assert "stratified, pilot 64" in text and "unused" not in text and "None" not in text
    assert "sha256:" + "ab" * 6 + "..." in text and "consistency form" in text
    exact = str(report(2, 2, details={"probability_flow": FLOW | {"divergence": "exact"}}))
    assert "exact" in exact and "probes" not in exact
    assert "Hutchinson" in text and "Hutchinson" not in exact
    unknown = str(report(FEWEST_REPLICATES, 2, details={"clipped": {"bits_per_dim": 2.5, "standard_error": None}}))
    assert "unknown" in unknown


MARGINAL = {"gain_bits": 2.25, "most_bits": 3.3219, "mixture_bits": 1234.5, "standard_error_over_images": 0.0625}


@pytest.mark.parametrize("is_bound", [True, False])
@pytest.mark.parametrize("error", [0.125, None])
@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.25, 0.75], [1.0, 2.0, 1.0]])
@pytest.mark.parametrize(
    ("condition", "one", "many"), [(None, "a label", "classes"), ("caption", "a caption", "captions")]
)
def test_what_a_label_is_worth_is_said_with_its_errors(
    is_bound: bool, error: float | None, prior: list[float], condition: str | None, one: str, many: str
) -> None:
    details: dict[str, Any] = {"marginal": MARGINAL | {"prior": prior, "standard_error": error}}
    details |= {} if condition is None else {"condition": condition}
    text = str(report(FEWEST_REPLICATES, 2, details=details, is_bound=is_bound))
    for said in ("2.2500", "3.3219", "1234.5000", "0.0625", one, f"{len(prior)} {many}"):
        assert said in text
    assert ("uniform" in text) == (prior == [0.5, 0.5])
    assert (f"{error:.4f}" in text) if error else ("unknown" in text)
    (mixture,) = (line for line in text.splitlines() if "1234.5000" in line)
    # The bias of one replicate is not known, so that there its sign is not, either.
    assert ("at most" in mixture) == (is_bound and error is not None)


@pytest.mark.parametrize("images", [True, False])
def test_levels_are_of_images_and_known_tokens_of_texts(images: bool) -> None:
    dataset = {"name": "d", "levels": 31, "fingerprint": "sha256:" + "0" * 64} | ({"images": {}} if images else {})
    (line,) = (line for line in str(report(2, 2, details={"dataset": dataset})).splitlines() if "dataset" in line)
    assert ("31 levels" in line) == images == ("31 tokens known" not in line)


@pytest.mark.parametrize("unit", [None, "bits/byte"])
def test_a_target_is_in_the_unit_that_it_was_asked_for_in(unit: str | None) -> None:
    target = {"standard_error": 0.25, "reached": True} | ({"unit": unit} if unit else {})
    (line,) = (line for line in str(report(2, 2, details={"target": target})).splitlines() if "target" in line)
    assert "0.25" in line and ("bits/byte" in line) == (unit is not None)


def test_the_clipped_models_figures_stand_beside() -> None:
    clipped = report(3, 4, seed=1, network_evaluations=9)
    both = report(3, 4).with_clipped(lambda: clipped)
    assert both.details["clipped"] == {
        "bits_per_dim": clipped.bits_per_dim,
        "standard_error": clipped.standard_error,
        "standard_error_over_images": clipped.standard_error_over_images,
        "terms": clipped.terms,
        "network_evaluations": 9,
    }


def test_a_clipped_flow_that_no_solver_follows_loses_no_figure() -> None:
    def fails() -> LikelihoodReport:
        raise DataError("step 31 shrank to nothing")

    flow = report(3, 4, is_bound=False).with_clipped(fails)
    assert "step 31 shrank to nothing" in flow.details["notes"][0] and "clipped" not in flow.details
    with pytest.raises(DataError):
        report(3, 4).with_clipped(fails)
