"""From a recipe to the parts of a run, and back to a pipeline: nothing that is said or learned is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_tokens
from distributions import write_metadata, write_pixelwise
from runs import LEARNED, configuration
from vdm_hub.data.conditions import ClassCondition
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.training.parts.setup import build_objective, build_pipeline, build_scheduler

STAGE = {"latent_shapes": [[2, 4, 4]], "block_out_channels": [8], "norm_num_groups": 4}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_timesteps", 50),
        ("prediction_type", "v_prediction"),
        ("conditioning", "flow_time"),
        ("data_scaling", "unit"),
        ("decoder", "ddpm"),
        ("noise_schedule", "cosine"),
        ("num_levels", 5),
    ],
)
def test_a_field_of_the_recipe_is_the_scheduler_s(field: str, value: Any, tmp_path: Path) -> None:
    plain, other = (build_scheduler(configuration(tmp_path, **given)).config[field] for given in ({}, {field: value}))
    assert str(value) in str(other) and str(value) not in str(plain)


def test_what_a_network_is_told_is_part_of_the_model_and_of_its_pipeline(tmp_path: Path) -> None:
    told = ClassCondition(3, ("cat", "dog", "eel"), 0.2, "animal")
    objective: Any = build_objective(configuration(tmp_path, label_column="label"), (1, 8, 8), told)
    assert objective.condition is told and objective.network.config.num_class_embeds == 4
    assert build_pipeline(objective).config.classes == told.pipeline_arguments()["classes"]
    plain: Any = build_objective(configuration(tmp_path), (1, 8, 8))
    assert plain.condition is None and plain.network.config.num_class_embeds is None
    assert build_pipeline(plain).condition is None
    latent: Any = build_objective(
        configuration(tmp_path, model="latent_vdm", first_stage=STAGE, label_column="label"), (1, 8, 8), told
    )
    assert latent.condition is told and latent.network.config.num_class_embeds == 4
    assert latent.network.config.fourier_features == (), "latents have no levels whose fine scales it could read"
    assert plain.network.config.fourier_features


@pytest.mark.usefixtures("token_plugin")
def test_texts_are_scored_behind_the_context_of_their_window(tmp_path: Path) -> None:
    tokenization = Tokenization(tiny_tokens.tokenizer())
    objective: Any = build_objective(
        configuration(tmp_path / "run", **tiny_tokens.run_fields(tmp_path, window_context=3)), (8,), None, tokenization
    )
    assert objective.scored == 5 and objective.process.num_levels == tokenization.num_values
    assert objective.network.model.config.vocab_size == tokenization.num_ids


def moved(objective: Any) -> Any:
    """The objective with weights that are no longer its initial ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.process.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=generator)
    return objective


def test_a_pipeline_carries_the_weights_that_no_config_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    objective = moved(build_objective(configuration(tmp_path, noise_schedule=LEARNED), (1, 8, 8)))
    schedule = build_pipeline(objective).process.scalar_gamma
    torch.testing.assert_close(schedule(times), objective.process.scalar_gamma(times))
    assert build_pipeline(objective).components["forward_process"] is None
    monkeypatch.syspath_prepend(write_pixelwise(tmp_path / "fakes"))
    pixelwise = {"name": "pixelwise", "config": {"size": 8}, "package": "fakes"}
    objective = moved(build_objective(configuration(tmp_path, noise_schedule=pixelwise), (1, 8, 8)))
    assert torch.equal(build_pipeline(objective).process.schedule.bend, objective.process.schedule.bend)
    entry = "[vdm_hub.forward_processes]\nlearned_resampling = plugin_of_law_7:LearnedResampling\n"
    monkeypatch.syspath_prepend(write_metadata(tmp_path / "site-packages", "vdm-hub-resampling", "0.1", entry))
    learned = configuration(tmp_path, forward_process="learned_resampling", noise_schedule="linear")
    objective = moved(build_objective(learned, (1, 8, 8)))
    process = build_pipeline(objective).process
    assert torch.equal(process.logit, objective.process.logit)


def test_regions_are_compiled_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that torch can't compile as one graph is an error: it would run in pieces, slower than plain."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: given.append(how))
    build_objective(configuration(tmp_path, compile="regional"), (1, 8, 8))
    assert given and all(how["fullgraph"] is True for how in given)
