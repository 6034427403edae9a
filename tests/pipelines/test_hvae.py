"""The hierarchical VAE as a pipeline: samples, latents, likelihood, saved and loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from naming import naming
from runs import environment
from tiny import randomised, seeded
from vdm_hub import HVAEPipeline, ImportanceWeighted, LikelihoodMethod, MarkovianHVAE, VariationalBound
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.levels import levels_from_images
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError
from vdm_hub.evaluation.evaluate import evaluate

LEVELS = torch.randint(0, 17, (5, 1, 8, 8), generator=seeded(1)).byte()


def pipeline(depth: int = 2, **arguments: Any) -> HVAEPipeline:
    torch.manual_seed(0)
    shapes = [(2, 4, 4), (6,), (3,)][:depth]
    fields = {"in_channels": 1, "num_levels": 17, "depth": depth, "latent_shapes": shapes, "norm_num_groups": 4}
    return HVAEPipeline(randomised(MarkovianHVAE(8, **fields | {"block_out_channels": (8,)} | arguments)))


def tensors(pipe: HVAEPipeline, *arguments: Any, **keywords: Any) -> Tensor:
    images: Tensor = pipe(*arguments, **keywords, output_type="pt").images
    return images


def test_samples_are_images_of_the_levels_and_a_function_of_their_generators() -> None:
    pipe = pipeline()
    one = tensors(pipe, 3, seeded(4))
    assert one.shape == (3, 1, 8, 8)
    assert levels_from_images(one, 17).max() <= 16
    assert torch.equal(one, tensors(pipe, 3, seeded(4)))
    assert not torch.equal(one, tensors(pipe, 3, seeded(5)))
    each = tensors(pipe, 3, [seeded(seed) for seed in range(3)])
    torch.testing.assert_close(each[2:], tensors(pipe, 1, [seeded(2)]))
    assert torch.equal(pipe.sample(3, seeded(4), 7), one)
    assert pipe(2, seeded()).images[0].size == (8, 8)
    assert pipe(2, seeded(), output_type="np", return_dict=False)[0].shape == (2, 8, 8, 1)


@pytest.mark.parametrize("depth", [1, 2])
def test_pixels_are_drawn_from_the_level_decoder(depth: int) -> None:
    """At one top latent and, at depth 1, no other randomness: frequencies of a pixel's levels against p(x|z_1)."""
    pipe = pipeline(depth)
    latents = torch.randn(1, *pipe.hvae.latent_shapes[-1], generator=seeded(3)).repeat_interleave(4000, 0)
    levels = levels_from_images(tensors(pipe, 4000, seeded(2), latents=latents), 17)
    with torch.no_grad():
        z = latents[:1] if depth == 1 else pipe.hvae.descend(latents, [torch.randn(4000, 2, 4, 4, generator=seeded())])
        expected = pipe.hvae.decode_levels(z).exp().mean(0)[0, 3, 3]
    counted = torch.bincount(levels[:, 0, 3, 3].long(), minlength=17) / 4000
    # 17 frequencies of 4,000 draws (of as many latents on the other side): 4.5 standard deviations each.
    deviation = (2 * expected * (1 - expected) / 4000).sqrt()
    assert bool(((counted - expected).abs() < 4.5 * deviation + 1e-3).all())


def test_latents_reconstructions_and_lines_between_them() -> None:
    pipe = pipeline(3)
    latents = pipe.encode(LEVELS, seeded())
    assert [tuple(z.shape) for z in latents] == [(5, 2, 4, 4), (5, 6), (5, 3)]
    means = pipe.encode(LEVELS, mean=True)
    assert not torch.equal(means[0], latents[0])
    assert torch.equal(means[2], pipe.encode(LEVELS, seeded(9), mean=True)[2])
    for t in (1, 2, 3):
        assert pipe.reconstruct(LEVELS, from_latent=t, output_type="pt").shape == (5, 1, 8, 8)
    line = pipe.interpolate(LEVELS[:2], LEVELS[2:4], steps=5, output_type="pt")
    assert line.shape == (10, 1, 8, 8)
    for row, (first, last) in enumerate(((0, 2), (1, 3))):
        ends = pipe.reconstruct(LEVELS[[first, last]], from_latent=3, output_type="pt")
        torch.testing.assert_close(line[5 * row], ends[0])
        torch.testing.assert_close(line[5 * row + 4], ends[1])
    assert len(pipe.interpolate(LEVELS[:1], LEVELS[1:2])) == 8


def test_what_is_saved_is_what_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["hvae"] == ["vdm_hub", "MarkovianHVAE"]
    report = pipe.bits_per_dim(LEVELS, replicates=2)
    np.savez(tmp_path / "expected.npz", samples=tensors(pipe, 2, seeded(1)), bits=report.per_image)
    script = """
import sys, numpy as np, torch, vdm_hub
from diffusers import DiffusionPipeline
expected = np.load(sys.argv[1] + "/expected.npz")
levels = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
for cls in (DiffusionPipeline, vdm_hub.HVAEPipeline):
    pipe = cls.from_pretrained(sys.argv[1])
    assert type(pipe) is vdm_hub.HVAEPipeline
    assert (pipe(2, torch.Generator().manual_seed(1), output_type="pt").images.numpy() == expected["samples"]).all()
    assert (pipe.bits_per_dim(levels, replicates=2).per_image.numpy() == expected["bits"]).all()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment())


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "hvae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        HVAEPipeline.from_pretrained(tmp_path)
    with pytest.raises((CheckpointError, OSError)):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["bound", ImportanceWeighted(draws=4)], ids=str)
def test_the_evaluator_and_the_pipeline_say_the_same(method: LikelihoodMethod | str) -> None:
    pipe = pipeline()
    ours = pipe.log_likelihood(LEVELS, method, replicates=3)
    report = evaluate(pipe, ImageLevels(LEVELS, (1, 8, 8), 17), method, replicates=3, progress=False)
    torch.testing.assert_close(report.per_image, ours.per_image)
    assert "2 latents" in str(report)
    assert "continuous" not in str(report)


def test_what_it_has_not_is_refused() -> None:
    pipe = pipeline()
    with pytest.raises(ConfigurationError, match=naming("transitions", 10, 2)):
        pipe.log_likelihood(LEVELS, VariationalBound(10))
    with pytest.raises(ConfigurationError, match=naming("'ode'")):
        pipe.log_likelihood(LEVELS, "ode")
    with pytest.raises(DataError, match=naming("(1, 6, 6)")):
        pipe.log_likelihood(LEVELS[..., :6, :6])
    with pytest.raises(DataError, match=naming("(1, 6, 6)")):
        pipe.encode(LEVELS[..., :6, :6])
    with pytest.raises(ConfigurationError, match=naming("from_latent", 3, 1, 2)):
        pipe.reconstruct(LEVELS, from_latent=3)
    with pytest.raises(ConfigurationError, match=naming("steps", 1)):
        pipe.interpolate(LEVELS[:1], LEVELS[:1], steps=1)
    with pytest.raises(DataError, match=naming(1, 2)):
        pipe.interpolate(LEVELS[:1], LEVELS[:2])
    with pytest.raises(ConfigurationError, match=naming("latents", "(2, 5)", "(6,)")):
        pipe(latents=torch.zeros(2, 5))
    with pytest.raises(ConfigurationError, match=naming("batch_size", 3, 2)):
        pipe(3, latents=torch.zeros(2, 6))
    with pytest.raises(ConfigurationError, match=naming("output_type", "'latent'")):
        pipe(output_type="latent")
    with pytest.raises(ConfigurationError, match=naming("batch_size", 0)):
        pipe(0)


class Linear(nn.Module):
    """``N(gain z + offset, scale^2)`` in every dimension of the latent, of the input's mean or of the latent below."""

    def __init__(self, gain: float, scale: float) -> None:
        super().__init__()
        self.gain, self.scale = gain, scale

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.gain * (z if z.ndim == 2 else z.flatten(1).mean(1, keepdim=True).expand(-1, 3))
        return mean, torch.full_like(mean, self.scale)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([(0.0, 1.0)], r"q\(z_1\|x\) is nearly the same for all \(0 nats .* so z_1 carries nothing"),
        (
            [(0.0, 1.0), (0.95, 0.3)],
            r"q\(z_1\|x\) .* so z_1 to z_2 carry nothing",
        ),  # z_2 knows z_1 only
        ([(3.0, 0.5), (0.0, 0.5)], r"q\(z_2\|z_1\) .* so z_2 carries nothing"),  # whatever its prior term is
        ([(3.0, 0.5), (0.7, 0.7)], None),
        ([(3.0, 0.5)], None),
    ],
)
def test_a_latent_that_carries_nothing_is_named(gains: list[tuple[float, float]], said: str | None) -> None:
    encoders = [Linear(*gain) for gain in gains]
    fields = {"in_channels": 1, "num_levels": 17, "block_out_channels": (8,), "norm_num_groups": 4}
    decoders = [Linear(0.7, 0.7) for _ in gains[1:]]
    pipe = HVAEPipeline(
        MarkovianHVAE(8, **fields, depth=len(gains), latent_shapes=[(3,)], encoders=encoders, decoders=decoders)
    )
    for method in (VariationalBound(), ImportanceWeighted(draws=2)):
        report = pipe.log_likelihood(LEVELS, method, replicates=2)
        assert len(report.details["latents"]["information"]) == len(gains)
        if said is None:
            assert not report.details.get("notes")
        else:
            (note,) = report.details["notes"]
            assert re.search(said, note), note
            assert note in str(report)
