"""diffusers' AutoencoderKL with a likelihood over K levels, and the VAE as a first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from naming import naming
from tiny import randomised, seeded
from vdm_hub import AutoencoderKLFirstStage, MarkovianHVAE
from vdm_hub.errors import CheckpointError, ConfigurationError

K = 7
CONFIG: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
}


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return randomised(AutoencoderKL(**CONFIG))


def stage(**arguments: Any) -> AutoencoderKLFirstStage:
    made = AutoencoderKLFirstStage.from_autoencoder(autoencoder(), sample_size=8, num_levels=K, **arguments)
    with torch.no_grad():
        made.log_scale += torch.tensor([0.3, -0.4])
    return made.eval()


LEVELS = torch.randint(0, K, (5, 2, 8, 8), generator=seeded(1))


def test_the_encoder_and_decoder_are_the_autoencoder_s_own() -> None:
    made, own = stage(), autoencoder()
    x = made.scale(LEVELS)
    q = own.encode(x).latent_dist
    mean, scale = made.posterior(x)
    assert torch.equal(mean, q.mean)
    assert torch.equal(scale, q.std)
    assert made.latent_shape == (3, 4, 4) == tuple(mean.shape[1:])
    assert torch.equal(made.likeliest_levels(mean), made.scaling.nearest(own.decode(mean).sample))


def test_the_likelihood_is_a_discretised_gaussian_normalised_over_the_levels() -> None:
    """Against the softmax over all levels in float64, and its gradients by autograd."""
    made = stage(initial_scale=0.2).double()
    y = torch.randn(5, 3, 4, 4, generator=seeded(2), dtype=torch.float64).requires_grad_()
    log_p = made.log_likelihood(LEVELS, y)
    values = made.scaling.encode(torch.arange(K), torch.float64)
    distance = values - made.autoencoder.decode(y).sample.unsqueeze(-1)
    scale = made.log_scale.exp().reshape(2, 1, 1, 1)
    by_hand = (-0.5 * (distance / scale) ** 2).log_softmax(-1)
    expected = by_hand.gather(-1, LEVELS.unsqueeze(-1)).flatten(1).sum(1)
    torch.testing.assert_close(log_p, expected, rtol=1e-9, atol=1e-9)
    wanted = [y, made.log_scale]
    for ours, theirs in zip(
        torch.autograd.grad(log_p.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_levels_are_drawn_from_the_likelihood() -> None:
    made = stage(initial_scale=0.5)
    y = torch.randn(1, 3, 4, 4, generator=seeded(3)).repeat(4000, 1, 1, 1)
    with torch.no_grad():
        drawn = made.draw_levels(y, seeded(4))[:, 1, 2, 5]
        values = made.scaling.encode(torch.arange(K))
        distance = values - made.autoencoder.decode(y[:1]).sample[0, 1, 2, 5]
        p = (-0.5 * (distance / made.log_scale[1].exp()) ** 2).softmax(0)
    counted = torch.bincount(drawn, minlength=K) / 4000
    assert bool(((counted - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt() + 1e-6).all())


def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    made = stage()
    made.save_pretrained(tmp_path)
    again = AutoencoderKLFirstStage.from_pretrained(tmp_path)
    y = torch.randn(5, 3, 4, 4, generator=seeded(2))
    assert torch.equal(made.log_likelihood(LEVELS, y), again.log_likelihood(LEVELS, y))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError):
        AutoencoderKLFirstStage.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"out_channels": 1}, {}, (2, 1)),
        ({}, {"sample_size": 9}, ("9x9", 2)),
        ({}, {"initial_scale": 0.0}, ("initial_scale", 0.0)),
        ({}, {"initial_scale": "a"}, ("initial_scale", "a")),
    ],
)
def test_what_has_no_likelihood_is_refused(config: dict[str, Any], arguments: dict[str, Any], message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        AutoencoderKLFirstStage(CONFIG | config, **{"sample_size": 8, "num_levels": K} | arguments)


def test_a_hierarchy_is_no_first_stage() -> None:
    model = MarkovianHVAE(8, in_channels=1, num_levels=K, depth=2, latent_shapes=[(4,)])
    with pytest.raises(ConfigurationError, match=naming("one latent", 2)):
        _ = model.latent_shape
