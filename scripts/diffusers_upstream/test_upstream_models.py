"""diffusers' model mixins on `UNetVDMModel` and `RegisteredModel`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from tests.models.testing_utils import (
    BaseModelTesterConfig,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.testing_utils import enable_full_determinism, torch_device

from vdm_hub import RegisteredModel, UNetVDMModel

enable_full_determinism()


class _ModelTests(ModelTesterMixin):
    """Upstream's, but for one message: where weights are missing, ours names safetensors and looks for no pickle."""

    def test_from_save_pretrained_variant(self, base_model_output: torch.Tensor, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = self.model_class(**self.get_init_dict()).to(torch_device).eval()
        model.save_pretrained(tmp_path, variant="fp16")
        with pytest.raises(OSError, match=r"Error no file named diffusion_pytorch_model\.safetensors found"):
            self.model_class.from_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path, variant="fp16").to(torch_device)
        output = loaded(**self.get_dummy_inputs(), return_dict=False)[0]
        torch.testing.assert_close(output, base_model_output, atol=5e-5, rtol=0)


class _UNetVDM(BaseModelTesterConfig):
    main_input_name = "sample"
    model_class = UNetVDMModel
    output_shape = (3, 16, 16)

    def get_init_dict(self) -> dict[str, Any]:
        return {
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_levels": (1,),
            "dropout": 0.0,
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        sample = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return {"sample": sample.to(torch_device), "timestep": torch.tensor([10.5], device=torch_device)}


class _UNetVDMWithClasses(_UNetVDM):
    def get_init_dict(self) -> dict[str, Any]:
        return super().get_init_dict() | {
            "num_class_embeds": 5,
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 4,
            "add_input": False,
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        return super().get_dummy_inputs() | {"class_labels": torch.tensor([0, 4, 2, 2], device=torch_device)}


class TestUNetVDM(_UNetVDM, _ModelTests):
    """The plain network."""


class TestUNetVDMWithClasses(_UNetVDMWithClasses, _ModelTests):
    """Class labels, scale and shift, several heads."""


class TestUNetVDMTraining(_UNetVDM, TrainingTesterMixin):
    """Needs an accelerator, as upstream says by its own skips."""

    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={"UNetVDMModel"})


class TestUNetVDMMemory(_UNetVDM, MemoryTesterMixin):
    """Offloading and layerwise casting; needs an accelerator."""


class TestUNetVDMCompile(_UNetVDM, TorchCompileTesterMixin):
    """Needs an accelerator."""


@dataclass
class GammaOutput(BaseOutput):
    gamma: torch.Tensor


class NoiseScheduleWithOutputs(RegisteredModel):
    """Answers as the mixin asks; the component itself is called like any schedule, for a tensor."""

    def forward(self, t: torch.Tensor, return_dict: bool = True) -> Any:
        gamma = super().forward(t)
        return GammaOutput(gamma) if return_dict else (gamma,)


class _Schedule(BaseModelTesterConfig):
    main_input_name = "t"
    model_class = NoiseScheduleWithOutputs
    output_shape = (4,)

    def get_init_dict(self) -> dict[str, Any]:
        return {"noise_schedule": {"name": "learned_monotone", "config": {"gamma_min": -8.0}}}

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"t": torch.linspace(0, 1, 4, device=torch_device)}


class TestRegisteredModel(_Schedule, _ModelTests):
    """The component that carries a schedule's weights."""


class TestRegisteredModelMemory(_Schedule, MemoryTesterMixin):
    """Needs an accelerator."""
