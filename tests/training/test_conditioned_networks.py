"""Laws of networks of several classes, ours and diffusers': each trains, measures and samples with what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from naming import naming
from plugin_of_law_7 import ResamplingProcess
from runs import UNET, configuration, start, train_here
from tiny import quiet, randomised, seeded, tiny_pipeline
from vdm_hub import ProbabilityFlow, VDMPipeline, VDMScheduler
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.calls import Call, named_arguments
from vdm_hub.models.conditions import check_condition, classes_of, takes_classes, takes_text, text_width_of
from vdm_hub.objectives.variational_bound import VDMObjective
from vdm_hub.training.parts import setup
from vdm_hub.training.parts.networks import build_network

PLAIN = {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
ATTENDING = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4}
ATTENDING |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
SMALL = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
CONDITIONAL = SMALL | {"_class_name": "UNet2DConditionModel"}
DIT = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1}
DIT |= {"norm_num_groups": 1}
LABELS, TEXT = {"classes": 10, "null": 1}, {"text_width": 6}

CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "ours": (UNET, {}),
    "ours, labels": (UNET, LABELS),
    "ours, text": (UNET, TEXT),
    "ours, both": (UNET, LABELS | TEXT),
    "UNet2DModel": (SMALL | PLAIN | {"_class_name": "UNet2DModel"}, {}),
    "UNet2DModel, labels": (SMALL | PLAIN | {"_class_name": "UNet2DModel"}, LABELS),
    "UNet2DConditionModel": (CONDITIONAL | PLAIN | {"mid_block_type": "UNetMidBlock2D"}, {}),
    "UNet2DConditionModel, labels": (CONDITIONAL | PLAIN | {"mid_block_type": "UNetMidBlock2D"}, LABELS),
    "UNet2DConditionModel, text": (CONDITIONAL | ATTENDING, TEXT),
    "UNet2DConditionModel, both": (CONDITIONAL | ATTENDING, LABELS | TEXT),
    "DiT": (DIT, {}),
    "DiT, labels": (DIT, LABELS),
}


@dataclass(frozen=True)
class Told:
    """What a network is told, by its sizes."""

    sizes: dict[str, int]

    def example(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in told(self.sizes, batch_size).items()}


def told(condition: dict[str, int], images: int) -> dict[str, Tensor]:
    """What each of some images is told, all of it different; the first is of the last class, and has one token."""
    given: dict[str, Tensor] = {}
    if "classes" in condition:
        given["class_labels"] = condition["classes"] - 1 - torch.arange(images) % condition["classes"]
    if "text_width" in condition:
        given["encoder_hidden_states"] = torch.randn(images, 4, condition["text_width"], generator=seeded(7))
        given["encoder_attention_mask"] = torch.arange(4) <= (torch.arange(images) % 4)[:, None]
    return given


SOME_CASES = ("ours, both", "UNet2DModel, labels", "UNet2DConditionModel, both", "DiT, labels")


@pytest.fixture(params=[name if name in SOME_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, int]]:
    return CASES[request.param]


def network(tmp_path: Path, unet: dict[str, Any], condition: dict[str, int], shape: tuple[int, int, int] = (1, 8, 8)):
    """The recipe's network with no layer at its initial zero."""
    built: Any = build_network(
        configuration(tmp_path, unet=unet), shape, ResamplingProcess(), condition=Told(condition)
    )
    return randomised(built)


def pipeline(tmp_path: Path, case: tuple[dict[str, Any], dict[str, int]]) -> VDMPipeline:
    return tiny_pipeline(network(tmp_path, *case))


def test_it_trains_by_a_recipe(
    case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, condition = case

    def build(*arguments: Any, **given: Any) -> Any:
        return build_network(*arguments, **given | {"condition": Told(condition)})

    monkeypatch.setattr(setup, "build_network", build)
    run = start(tmp_path / "run", unet=unet, max_train_steps=2)
    before = [parameter.detach().clone() for parameter in run.model.body.parameters()]
    for batches in run.batches():
        terms = run.optimise([batch | told(condition, 16) for batch in batches])
        assert all(bool(term.isfinite()) for term in terms.values())
    assert run.step == 2
    after = list(run.model.body.parameters())
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_its_bound_is_each_images_own(case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path) -> None:
    objective = VDMObjective(network(tmp_path, *case), VDMScheduler(num_levels=17).process)
    batch = {"levels": torch.randint(17, (3, 1, 8, 8), generator=seeded())} | told(case[1], 3)
    times, noise = torch.tensor([0.1, 0.5, 0.9]), objective.draw_noise(batch, seeded(1))
    together = objective(batch, times, noise).total
    assert bool(together.isfinite().all())
    for i in range(3):
        one = ({name: value[i, None] for name, value in given.items()} for given in (batch, noise))
        batch_of_one, noise_of_one = one
        alone = objective(batch_of_one, times[i, None], noise_of_one).total
        torch.testing.assert_close(alone, together[i, None], rtol=1e-4, atol=0)


def test_each_image_has_a_timestep_and_a_condition_of_its_own(
    case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    body = network(tmp_path, *case)
    call, z, timestep = Call.of(body), torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([3.25, 700.0])
    given = told(case[1], 2)

    def changed(timestep: Tensor, **given: Tensor) -> list[bool]:
        difference = call(body, z, timestep, **given) - call(body, z, torch.tensor([3.25, 700.0]), **told(case[1], 2))
        return (difference.abs() > 1e-6).flatten(1).any(1).tolist()

    assert changed(torch.tensor([3.25, 701.0]), **given) == [False, True]
    for name, value in given.items():
        if name != "encoder_attention_mask":
            other = value.clone()
            other[1, ...] = value[0, ...]
            assert changed(timestep, **given | {name: other}) == [False, True], name
    scalar = call(body, z, timestep[0], **given)
    torch.testing.assert_close(scalar, call(body, z, timestep[:1].expand(2), **given), rtol=1e-4, atol=1e-5)


def test_it_is_saved_sampled_and_measured_as_it_is(
    case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    pipe, given = pipeline(tmp_path, case), told(case[1], 2)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = quiet(VDMPipeline.from_pretrained(tmp_path / "saved"))
    images = torch.randint(17, (2, 1, 8, 8), generator=seeded())
    found = []
    for one in (pipe, loaded):
        samples = one(2, seeded(3), num_inference_steps=3, output_type="pt", **given).images
        bound = one.bits_per_dim(images, replicates=2, **given)
        found.append((samples, bound.per_image))
        assert bool(samples.isfinite().all()) and bool(bound.per_image.isfinite().all())
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    rows = 10 if type(pipe.unet) is DiTTransformer2DModel else 11  # it keeps a null class beside them
    assert pipe.num_classes == (rows if "classes" in case[1] else None)


def test_its_ode_is_measured(case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path) -> None:
    pipe, given = pipeline(tmp_path, case), told(case[1], 1)
    images = torch.randint(17, (1, 1, 8, 8), generator=seeded())
    report = pipe.bits_per_dim(images, ProbabilityFlow(tolerance=0.05), replicates=1, **given)
    assert bool(report.per_image.isfinite().all())


def test_a_stock_sampler_and_half_precision_call_it_too(
    case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    pipe, given = pipeline(tmp_path, case), told(case[1], 2)
    pipe.to(torch.bfloat16)
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"} | given
    assert bool(pipe(2, seeded(), **arguments).images.isfinite().all())
    pipe.scheduler = pipe.scheduler.to_diffusers(DDIMScheduler)
    assert bool(pipe(2, seeded(), **arguments).images.isfinite().all())
    assert bool(pipe.bits_per_dim(torch.zeros(2, 1, 8, 8), replicates=1, **given).per_image.isfinite().all())


def test_what_it_is_conditioned_on_is_missed_before_it_is_called(
    case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    body, given = network(tmp_path, *case), told(case[1], 2)
    call, inputs = Call.of(body), (torch.zeros(2, 1, 8, 8), torch.zeros(2))
    assert call(body, *inputs, **given).shape == (2, 1, 8, 8)
    for name in call.needed:
        assert name in given
        with pytest.raises(ConfigurationError, match=naming(name, type(body).__name__)):
            call(body, *inputs, **{key: value for key, value in given.items() if key != name})
    assert set(call.needed) == set(given) - {"encoder_attention_mask"}


def test_what_a_network_takes_is_known_from_it_alone(
    case: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    body, condition = network(tmp_path, *case), case[1]
    assert classes_of(body) == (11 if "classes" in condition else None)
    assert text_width_of(body) == condition.get("text_width")
    assert (takes_classes(body), takes_text(body)) == ("classes" in condition, "text_width" in condition)
    taken = named_arguments(body)
    assert taken is not None and ("encoder_hidden_states" in taken) == ("text_width" in condition)
    check_condition(body, condition)
    for other in ({}, LABELS, TEXT, LABELS | TEXT, {"classes": 12}, {"text_width": 7}):
        fits = set(other) == set(condition) and other.get("classes", 0) < 11
        if fits and other.get("text_width") == condition.get("text_width"):
            check_condition(body, other)
        else:
            with pytest.raises(ConfigurationError, match=naming(type(body).__name__)):
                check_condition(body, other)


@pytest.mark.parametrize(
    ("unet", "condition", "shape", "named"),
    [
        (CASES["UNet2DModel"][0], TEXT, (1, 8, 8), ("UNet2DModel", "encoder_hidden_states", "cross_attention_dim=6")),
        (DIT, TEXT, (1, 8, 8), ("DiTTransformer2DModel", "encoder_hidden_states", "cross_attention_dim=6")),
        (
            CONDITIONAL | ATTENDING,
            {},
            (1, 8, 8),
            ("UNet2DConditionModel", "encoder_hidden_states", 1280, "UNet2DModel"),
        ),
        (CASES["UNet2DConditionModel"][0], TEXT, (1, 8, 8), ("UNet2DConditionModel", "encoder_hidden_states", 6)),
        (UNET | {"num_class_embeds": 10}, LABELS, (1, 8, 8), ("num_class_embeds=10", "num_class_embeds=11")),
        (UNET | {"num_class_embeds": 10}, {}, (1, 8, 8), ("UNetVDMModel", 10, "class_labels")),
        (DIT | {"num_embeds_ada_norm": 10}, {}, (1, 8, 8), ("DiTTransformer2DModel", 11, "class_labels")),
        (DIT | {"num_embeds_ada_norm": 9}, LABELS, (1, 8, 8), ("num_embeds_ada_norm=9", "num_embeds_ada_norm=10")),
        (UNET | {"cross_attention_dim": 5}, TEXT, (1, 8, 8), ("cross_attention_dim=5", "cross_attention_dim=6")),
        (CONDITIONAL | PLAIN | {"class_embed_type": "timestep"}, LABELS, (1, 8, 8), ("class_embed_type=timestep",)),
        (DIT, LABELS, (1, 8, 16), ("DiTTransformer2DModel", "1x8x16", "sample_size")),
        (DIT | {"patch_size": 3}, LABELS, (1, 8, 8), ("DiTTransformer2DModel", "patch_size=3", "1x8x8")),
        (CASES["UNet2DModel"][0], {}, (1, 7, 7), ("UNet2DModel", "1x7x7")),
    ],
)
def test_a_network_that_can_t_be_told_or_laid_over_the_data_is_refused_before_a_step(
    unet: dict[str, Any], condition: dict[str, int], shape: Any, named: tuple[Any, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=naming(*named)):
        network(tmp_path, unet, condition, shape)


def test_diffusers_dit_drops_no_label_of_its_own(tmp_path: Path) -> None:
    """Which labels are left out is a draw of whoever trains; its table keeps the row for them."""
    body = network(tmp_path, *CASES["DiT, labels"]).train()
    again = DiTTransformer2DModel.from_config(body.config)
    again.load_state_dict(body.state_dict())
    labels, inputs = torch.arange(10).repeat(8), (torch.ones(80, 1, 8, 8), torch.zeros(80))
    outputs = [Call.of(one)(one, *inputs, class_labels=labels) for one in (body, body, again.train())]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert not torch.allclose(outputs[0][0], Call.of(body)(body, *inputs, class_labels=torch.full((80,), 10))[0])


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "DiT"])
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_a_run_on_labels_ends_with_a_pipeline_that_is_asked_for_classes(
    name: str, dropout: float, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"unet": CASES[name][0], "label_column": "label", "condition_dropout": dropout}
    report = train_here(tmp_path / "run", **fields, max_train_steps=2, evaluation_replicates=1, eval_batch_size=360)
    assert report is not None and report.num_images == 360
    pipe = quiet(VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline"))
    assert pipe.num_classes == 10 and classes_of(pipe.unet) == 10 + (dropout > 0 or name == "DiT")
    arguments: dict[str, Any] = {"class_labels": [3, 9], "num_inference_steps": 2, "output_type": "pt"}
    assert bool(pipe(2, seeded(), **arguments).images.isfinite().all())
    if dropout > 0:
        assert bool(pipe(2, seeded(), **arguments, guidance_scale=2.0).images.isfinite().all())
