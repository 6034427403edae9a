"""The component that carries a schedule's weights: float32 whatever is asked of the pipeline around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin

import registered
from naming import naming
from tiny import tiny_unet
from vdm_hub import RegisteredModel, VDMPipeline, VDMScheduler, registry
from vdm_hub.diffusion.learned_schedules import LearnedMonotoneSchedule
from vdm_hub.errors import ConfigurationError

LEARNED = ["learned_linear", "learned_monotone"]
TIMES = torch.linspace(0, 1, 33)


def trained_model(name: str = "learned_monotone") -> RegisteredModel:
    return RegisteredModel.carrying(registered.learned(name))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_schedule_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = trained_model(name)
    weights, gamma = {n: w.clone() for n, w in model.module.state_dict().items()}, model(TIMES)
    model.to(dtype)
    assert model.dtype == dtype
    for weight_name, weight in model.module.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, weights[weight_name])
    assert torch.equal(model(TIMES), gamma)


def test_a_cast_of_the_pipeline_leaves_the_schedule_alone() -> None:
    unet = tiny_unet()
    model = trained_model()
    gamma = model(TIMES)
    pipe = VDMPipeline(unet, VDMScheduler(num_levels=17, noise_schedule="learned_monotone"), model)
    pipe.to(torch.bfloat16)
    assert pipe.unet.dtype == pipe.dtype == torch.bfloat16
    assert torch.equal(pipe.noise_schedule(TIMES), gamma)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_the_weights_are_loaded_in_float32(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = trained_model()
    model.save_pretrained(tmp_path)
    loaded = RegisteredModel.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(loaded(TIMES), model(TIMES))


def test_weights_saved_from_a_cast_model_lose_nothing(tmp_path: Path) -> None:
    model = trained_model()
    gamma = model(TIMES)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert torch.equal(RegisteredModel.from_pretrained(tmp_path)(TIMES), gamma)


def test_the_config_is_the_serialised_form_alone(tmp_path: Path) -> None:
    schedule = LearnedMonotoneSchedule(-9.0, 4.0, hidden_features=8)
    RegisteredModel.carrying(schedule).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key for key, value in config.items() if not key.startswith("_") and value is not None} == {
        "noise_schedule"
    }
    for wrong in ({}, {"noise_schedule": "learned_linear", "network": "UNetVDMModel"}):
        with pytest.raises(ConfigurationError, match=naming("noise_schedule", "forward_process", "network")):
            RegisteredModel(**wrong)
    assert config["noise_schedule"] == registry.serialise("noise_schedules", schedule)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_model_of_a_schedule_is_a_copy() -> None:
    schedule = LearnedMonotoneSchedule(-9.0, 4.0, hidden_features=8)
    model = RegisteredModel.carrying(schedule)
    gamma = model(TIMES)
    with torch.no_grad():
        schedule.gamma_min += 1.0
    assert torch.equal(model(TIMES), gamma)


def test_it_trains_and_is_one_of_diffusers_models() -> None:
    model = RegisteredModel("learned_linear")
    assert isinstance(model, ModelMixin) and RegisteredModel.__module__ == "vdm_hub"
    model.to(torch.bfloat16)
    model(TIMES).sum().backward()
    assert model.module.gamma_min.grad is not None  # type: ignore[union-attr]
