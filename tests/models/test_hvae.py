"""The hierarchical VAE's networks: shapes that chain, scales that are positive, what is saved is what is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from naming import naming
from runs import environment
from tiny import randomised
from vdm_hub import HVAEObjective, MarkovianHVAE
from vdm_hub.errors import ConfigurationError

SHAPES = st.one_of(st.tuples(st.integers(1, 12)), st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))


def hvae(**arguments: Any) -> MarkovianHVAE:
    fields = {
        "sample_size": 8,
        "in_channels": 1,
        "num_levels": 17,
        "latent_shapes": [(4,)],
        "block_out_channels": (8,),
    }
    return MarkovianHVAE(**fields | {"norm_num_groups": 4} | arguments).eval()


@settings(max_examples=25, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 2), st.integers(0, 3))
def test_latents_of_any_shapes_chain_up_and_down(shapes: list[tuple[int, ...]], channels: int, layers: int) -> None:
    model = hvae(
        depth=len(shapes), latent_shapes=shapes, in_channels=channels, sample_size=(6, 5), layers_per_block=layers
    )
    x = model.scale(torch.zeros(2, channels, 6, 5, dtype=torch.long))
    noise = [torch.randn(2, *shape) for shape in shapes]
    latents = model.latents(x, noise)
    assert [tuple(z.shape[1:]) for z in latents] == shapes
    z = model.descend(latents[-1], noise[:-1][::-1])
    log_p = model.decode_levels(z)
    assert log_p.shape == (2, channels, 6, 5, 17)
    torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(2, channels, 6, 5), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert all(bool((normal.scale > 0).all()) for normal, _ in model.climb(x, noise))


def test_gradients_reach_every_parameter_through_the_draws() -> None:
    model = randomised(hvae(depth=3, latent_shapes=[(2, 4, 4), (8,), (3,)]))
    latents = model.latents(model.scale(torch.ones(2, 1, 8, 8)), [torch.randn(2, *s) for s in model.latent_shapes])
    down = model.descend(latents[-1], [torch.randn(2, *s) for s in model.latent_shapes[-2::-1]])
    model.decode_levels(down).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_what_is_saved_is_what_a_fresh_process_loads(tmp_path: Path) -> None:
    model = randomised(hvae(depth=2, latent_shapes=[(2, 4, 4), (8,)], layers_per_block=1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["depth"] == 2
    assert not {"encoders", "decoders", "level_decoder"} & config.keys()
    z = torch.linspace(-1, 1, 8).repeat(2, 1)
    torch.save((z, model.decode_levels(model.descend(z, [torch.zeros(2, 2, 4, 4)]))), tmp_path / "expected.pt")
    script = """
import sys, torch
from vdm_hub import HVAEObjective, MarkovianHVAE
model = MarkovianHVAE.from_pretrained(sys.argv[1])
z, expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model.decode_levels(model.descend(z, [torch.zeros(2, 2, 4, 4)])), expected)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment())


class Half(nn.Module):
    """A module of one's own: it gives what it is told to."""

    def __init__(self, mean: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        self.mean, self.value = mean, scale

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.zeros(z.shape[0], *self.mean)
        return mean, torch.full_like(mean, self.value)


def test_any_module_takes_the_place_of_a_network_and_is_not_saved_as_if_it_were_one(tmp_path: Path) -> None:
    model = hvae(encoders=[Half((4,))])
    assert model.latents(torch.zeros(2, 1, 8, 8), [torch.ones(2, 4)])[0].eq(1).all()
    with pytest.raises(ConfigurationError, match=naming("Half", "state_dict")):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, ("depth", 0)),
        ({"depth": -1}, ("depth", "-1")),
        ({"depth": 3, "latent_shapes": [(4,), (2,)]}, ("latent_shapes", 2, "depth 3")),
        ({"latent_shapes": [(4, 4)]}, ("(4, 4)", "(channels, height, width)")),
        ({"latent_shapes": [(0,)]}, ("latent_shapes", "[(0,)]")),
        ({"depth": 2, "encoders": [Half((4,))]}, ("encoders", 1, 2)),
        ({"decoders": [Half((4,))]}, ("decoders", 1, 0)),
        ({"norm_num_groups": 3}, ("block_out_channels", 8, "norm_num_groups", 3)),
    ],
)
def test_what_no_hierarchy_can_be_built_of_is_refused(arguments: dict[str, Any], message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        hvae(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"encoders": [Half((5,))]},
            ("z_1", "(2, 5)", "(2, 4)"),
        ),
        ({"encoders": [Half((4,), 0.0)]}, ("z_1", "scale", 0)),
        ({"encoders": [Half((4,), -1.5)]}, ("z_1", "scale", "-1.5")),
        ({"encoders": [Half((4,), float("nan"))]}, ("z_1", "scale", "nan")),
        ({"level_decoder": nn.Linear(4, 3)}, ("level decoder", "(2, 3)")),
    ],
)
def test_a_module_that_breaks_its_contract_is_named(arguments: dict[str, Any], message: Any) -> None:
    model = hvae(**arguments)
    with pytest.raises(ConfigurationError, match=naming(*message)):
        model.decode_levels(model.latents(torch.zeros(2, 1, 8, 8), [torch.ones(2, 4)])[0])


def test_a_decoder_that_breaks_its_contract_is_named() -> None:
    model = hvae(depth=2, decoders=[Half((3,))])
    with pytest.raises(ConfigurationError, match=naming("z_1", "(2, 3)")):
        model.decode(1, torch.zeros(2, 4))


def test_an_image_of_another_size_does_not_chain() -> None:
    with pytest.raises(ConfigurationError, match=naming("(1, 8, 8)", "(1, 6, 6)")):
        hvae().encode(1, torch.zeros(2, 1, 6, 6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": []}, ("block_out_channels", "[]")),
        ({"norm_num_groups": 0}, ("norm_num_groups", 0)),
        ({"layers_per_block": -1}, ("layers_per_block", "-1")),
        ({"num_levels": 1}, ("num_levels", 1)),
        ({"depth": 1.5}, ("depth", 1.5)),
        ({"depth": "2"}, ("depth", "'2'")),
        ({"latent_shapes": [4]}, ("latent_shapes", "[4]")),
        ({"latent_shapes": [[4.7]]}, ("latent_shapes",)),
        ({"dropout": 1.0}, ("dropout", 1.0)),
    ],
)
def test_arguments_that_describe_no_network_are_refused(fields: dict[str, Any], message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        MarkovianHVAE(8, **{"in_channels": 1, "latent_shapes": [(4,)]} | fields)


class Gives(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, z: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, 3), ("z_1", "Tensor")),
        (torch.distributions.Normal(torch.zeros(2, 3), 1.0), ("Normal",)),
        ((torch.full((2, 3), torch.nan), torch.ones(2, 3)), ("z_1", "finite")),
        ((torch.zeros(2, 3), torch.full((2, 3), torch.inf)), ("z_1", "finite")),
        ((torch.zeros(2, 3), -torch.ones(2, 3)), ("scale", "-1")),
    ],
)
def test_an_encoder_that_gives_no_gaussian_is_named(answer: Any, message: Any) -> None:
    model = MarkovianHVAE(8, in_channels=1, latent_shapes=[(3,)], encoders=[Gives(answer)])
    with pytest.raises(ConfigurationError, match=naming(*message)):
        model.encode(1, torch.zeros(2, 1, 8, 8))


def test_a_negative_scale_in_a_compiled_graph_makes_the_bound_nan() -> None:
    """There nobody looks at values; squared in the prior's divergence it would go unseen."""
    fields = {"in_channels": 1, "num_levels": 5, "latent_shapes": [(3,)], "block_out_channels": (8,)}
    encoder = Gives((torch.zeros(2, 3), -torch.ones(2, 3)))
    objective = HVAEObjective(MarkovianHVAE(8, **fields, encoders=[encoder]))
    batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long)}
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
    bound = torch.compile(objective, backend="eager")(batch, torch.empty(0), noise)
    assert bool(bound.total.isnan().all())


@pytest.mark.parametrize("shapes", [[(5,), (4,)], [(3, 1, 1), (4,)], [(3, 1, 1), (2, 1, 1)]])
def test_a_network_between_latents_of_one_pixel_sees_what_it_is_given(shapes: list[Any]) -> None:
    """With as many groups as channels, a group would be a single number, and normalised to nothing."""
    fields = {"in_channels": 1, "num_levels": 5, "block_out_channels": (8,), "norm_num_groups": 8}
    model = MarkovianHVAE(8, **fields, depth=2, latent_shapes=shapes).eval()
    for network, shape in ((model.encoders[1], shapes[0]), (model.decoders[0], shapes[1])):
        one, other = (network(torch.full((1, *shape), value))[0] for value in (-1.0, 2.0))
        assert float((one - other).detach().abs().max()) > 1e-3
