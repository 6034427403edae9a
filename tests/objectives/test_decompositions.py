"""Every form of the bound, by every door: one expectation on every rung, named in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import linear_gaussian
from naming import naming
from tiny import quiet, randomised, seeded, tiny_unet
from vdm_hub import (
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    UNetVDMModel,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
)
from vdm_hub.commands.__main__ import main
from vdm_hub.data.images import ImageLevels
from vdm_hub.diffusion.draws import image_generator
from vdm_hub.errors import ConfigurationError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.likelihood.comparison import compare_decompositions
from vdm_hub.likelihood.methods import method_of
from vdm_hub.objectives.decompositions import _DRAWS, decompositions, form_of

LEVELS = torch.randint(0, 17, (6, 1, 8, 8), generator=seeded(1)).byte()
# So narrow that 12 transitions are gentle steps: with steep ones a random network's forms have no useful variance.
SCHEDULE = {"name": "linear", "config": {"gamma_min": -2.0, "gamma_max": 3.0}}
TRANSITIONS = {"vdm": 12, "latent": 12, "vae": None, "hvae": None}
EXPECTED = {
    "vdm": ["denoising_matching", "consistency"],
    "latent": ["denoising_matching", "consistency"],
    "vae": ["consistency", "joint"],
    "hvae": ["consistency", "joint"],
}


def pipeline(rung: str) -> Any:
    torch.manual_seed(0)
    scheduler = VDMScheduler(num_levels=17, noise_schedule=SCHEDULE)
    fields: dict[str, Any] = {"in_channels": 1, "num_levels": 17, "block_out_channels": (8,), "norm_num_groups": 4}
    if rung == "vdm":
        return quiet(VDMPipeline(tiny_unet(fourier_features=()), scheduler))
    if rung == "latent":
        stage = randomised(MarkovianHVAE(8, **fields, latent_shapes=[(2, 4, 4)]))
        size = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "block_out_channels": (8,)}
        unet = UNetVDMModel(**size, layers_per_block=1, norm_num_groups=4, fourier_features=())
        return quiet(LatentVDMPipeline(stage, randomised(unet), scheduler))
    shapes = [(2, 4, 4), (3,)] if rung == "hvae" else [(4,)]
    return quiet(HVAEPipeline(randomised(MarkovianHVAE(8, **fields, depth=len(shapes), latent_shapes=shapes))))


@pytest.mark.parametrize("rung", EXPECTED)
def test_each_rung_has_its_forms_and_they_have_one_mean(rung: str) -> None:
    objective = pipeline(rung).objective(TRANSITIONS[rung])
    assert list(decompositions(objective)) == EXPECTED[rung]
    forms = compare_decompositions(objective, {"levels": LEVELS}, draws=100)
    means, errors = list(forms.bits_per_dim.values()), list(forms.standard_error.values())
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    assert all(variance > 0 for variance in forms.variance.values())


def test_a_comparison_is_the_mean_the_error_and_the_variance_of_its_draws() -> None:
    """Draw by draw, each a function of the seed, the draw and the image."""
    model, levels, bits = linear_gaussian.objective(3), linear_gaussian.images(4), 16 * math.log(2)
    model.train()
    forms = compare_decompositions(model, {"levels": levels}, draws=3, seed=2)
    assert forms.draws == 3 and model.training
    assert all(name in str(forms) for name in forms.bits_per_dim)
    for name, form in decompositions(model).items():
        values = []
        for draw in range(3):
            generators = [image_generator(2, draw, image, _DRAWS) for image in range(4)]
            times = torch.stack([torch.rand((), generator=generator) for generator in generators])
            noise = form.draw_noise({"levels": levels}, generators)
            values.append(form({"levels": levels}, times, noise).total.double() / bits)
        each = torch.stack(values)
        assert forms.bits_per_dim[name] == pytest.approx(float(each.mean()), rel=1e-9)
        assert forms.standard_error[name] == pytest.approx(float(each.mean(1).std()) / math.sqrt(3), rel=1e-9)
        assert forms.variance[name] == pytest.approx(float(each.var(0).mean()), rel=1e-9)
    other = compare_decompositions(model, {"levels": levels}, draws=32, seed=0)
    assert other == compare_decompositions(model, {"levels": levels}) != forms


@pytest.mark.parametrize("rung", EXPECTED)
def test_pipeline_and_evaluator_give_the_form_that_is_asked_for(rung: str) -> None:
    pipe, images = pipeline(rung), ImageLevels(LEVELS, (1, 8, 8), 17)
    for form in EXPECTED[rung]:
        method = VariationalBound(TRANSITIONS[rung], decomposition=form)
        report = evaluate(pipe, images, method, replicates=2, progress=False)
        torch.testing.assert_close(report.per_image, pipe.log_likelihood(LEVELS, method, replicates=2).per_image)
        assert report.to_dict()["options"] == method.chosen() and method.chosen()["decomposition"] == form
        assert f"decomposition: {form.replace('_', ' ')}" in str(report)
    plain = pipe.log_likelihood(LEVELS, VariationalBound(TRANSITIONS[rung])).to_dict()
    assert "decomposition" not in plain.get("options", {})


def test_a_form_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=naming("transitions")):
        pipeline("vdm").log_likelihood(LEVELS, method=VariationalBound(decomposition="consistency"))
    with pytest.raises(ConfigurationError, match=naming("'joint'", "consistency", "denoising_matching")):
        pipeline("vdm").log_likelihood(LEVELS, method=VariationalBound(decomposition="joint", transitions=3))
    with pytest.raises(ConfigurationError, match=naming("'consistency'", "'ode'")):
        method_of("ode").from_options({"decomposition": "consistency"})
    assert list(decompositions(pipeline("vdm").objective(None))) == ["denoising_matching"], "in continuous time"
    hierarchy = pipeline("hvae").objective(None)
    with pytest.raises(ConfigurationError, match=naming("consistency", "joint")):
        form_of(hierarchy, "denoising_matching")
    with pytest.raises(ConfigurationError, match=naming("decomposition", "'both'")):
        form_of(hierarchy, "both")
    with pytest.raises(ConfigurationError, match="NoneType"):
        decompositions(None)  # type: ignore[arg-type]
    assert form_of(hierarchy, None) is hierarchy
    assert type(form_of(hierarchy, "joint")).__name__ == "JointHVAEObjective"


def test_the_command_has_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline("hvae").save_pretrained(tmp_path / "pipeline")
    words = ["evaluate", str(tmp_path / "pipeline"), "--dataset_name", "digits", "--max_images", "5", "--json"]
    assert main([*words, "--decomposition", "joint"]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == {"decomposition": "joint"}
