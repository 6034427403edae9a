"""Laws of the VDM network: its size, its start, what survives saving, and what precision does to it."""

import doctest
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from naming import naming
from vdm_hub import UNetVDMModel
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.unet_vdm import FourierFeatures

SMALL = {"in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "layers_per_block": 2, "norm_num_groups": 8}
VARIANTS = {
    "paper": SMALL | {"in_channels": 3, "out_channels": 3},
    "no_features": SMALL | {"fourier_features": ()},
    "two_resolutions": SMALL | {"block_out_channels": (16, 24), "attention_levels": (1,)},
    "attention_everywhere": SMALL | {"attention_levels": (0,), "attention_head_dim": 8},
    "no_attention": SMALL | {"mid_block_attention": False},
    "scale_shift": SMALL | {"resnet_time_scale_shift": "scale_shift"},
    "no_input": SMALL | {"add_input": False, "in_channels": 2},
    "classes": SMALL | {"num_class_embeds": 10},
    "text": SMALL | {"cross_attention_dim": 12},
    "text_everywhere": SMALL
    | {"cross_attention_dim": 6, "block_out_channels": (16, 24), "attention_levels": (1,), "attention_head_dim": 8},
}


def build(name: str, randomise: bool = True, **changes) -> UNetVDMModel:
    torch.manual_seed(0)
    model = UNetVDMModel(**(VARIANTS[name] | {"dropout": 0.0} | changes)).eval()
    if randomise:  # the branches that start at zero would hide everything behind them
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model: UNetVDMModel, batch: int = 3, size: int = 8) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A sample, its timesteps and what the network is conditioned on; the captions have 1, 2, ... tokens of 5."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, model.config.in_channels, size, size, generator=generator)
    timestep = torch.rand(batch, generator=generator) * (model.config.num_train_timesteps - 1)
    classes, width = model.config.num_class_embeds, model.config.cross_attention_dim
    given = {} if classes is None else {"class_labels": torch.arange(batch) % classes}
    if width is not None:
        mask = torch.arange(5) <= torch.arange(batch)[:, None]
        states = torch.randn(batch, 5, width, generator=generator)
        given |= {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    return sample, timestep, given


@pytest.fixture(params=VARIANTS)
def model(request) -> UNetVDMModel:
    return build(request.param)


def test_the_default_is_the_papers_cifar10_network():
    with torch.device("meta"):
        model = UNetVDMModel()
    norm, conv = 2 * 128, 128 * 128 * 9 + 128
    block = 2 * norm + 2 * conv + 512 * 128  # two norms, two convolutions, the noise level
    up = block + norm + 128 * 128 * 9 + (256 * 128 + 128)  # twice the input channels, and a shortcut
    attention = norm + 4 * (128 * 128 + 128)
    time = (128 * 512 + 512) + (512 * 512 + 512)
    ends = (15 * 128 * 9 + 128) + norm + (128 * 3 * 9 + 3)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == ends + time + 34 * block + attention + 33 * up
    assert round(count / 1e6, 2) == 30.58


@pytest.mark.parametrize("name", VARIANTS)
def test_before_training_it_is_the_identity_or_zero(name):
    model = build(name, randomise=False)
    sample, timestep, given = inputs(model)
    expected = sample if model.config.add_input else torch.zeros(3, 1, 8, 8)
    assert torch.equal(model(sample, timestep, **given).sample, expected)


def test_the_output_has_the_images_size_and_the_asked_channels(model):
    for size in (8, 12):
        sample, timestep, given = inputs(model, size=size)
        output = model(sample, timestep, **given, return_dict=False)[0]
        assert output.shape == (3, model.config.out_channels, size, size)
        assert output.isfinite().all()


def test_every_parameter_gets_a_gradient(model):
    sample, timestep, given = inputs(model)
    model(sample, timestep, **given).sample.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_saved_is_what_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=True)
    loaded = UNetVDMModel.from_pretrained(tmp_path, use_safetensors=True)
    sample, timestep, given = inputs(model)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert torch.equal(loaded(sample, timestep, **given).sample, model(sample, timestep, **given).sample)


def test_a_scalar_timestep_is_the_same_for_all(model):
    sample, _, given = inputs(model)
    scalar = torch.tensor(123.4)
    expected = model(sample, scalar.expand(3), **given).sample
    for timestep in (scalar, scalar[None], 123.4):
        torch.testing.assert_close(model(sample, timestep, **given).sample, expected, rtol=1e-4, atol=1e-5)


def test_fractions_of_a_timestep_count(model):
    sample, _, given = inputs(model)
    outputs = [model(sample, torch.tensor(timestep), **given).sample for timestep in (0.0, 0.5)]
    assert not torch.allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_each_image_is_predicted_on_its_own(model):
    sample, timestep, given = inputs(model)
    together = model(sample, timestep, **given).sample
    each = [{name: value[i, None] for name, value in given.items()} for i in range(3)]
    alone = [model(sample[i, None], timestep[i], **each[i]).sample for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


def test_channels_last_changes_the_layout_and_nothing_else(model):
    sample, timestep, given = inputs(model)
    expected = model(sample, timestep, **given).sample
    model.to(memory_format=torch.channels_last)
    output = model(sample.contiguous(memory_format=torch.channels_last), timestep, **given).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    sample, timestep, given = inputs(model)
    gradients = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing() if enabled else model.disable_gradient_checkpointing()
        model.train().zero_grad()
        model(sample, timestep, **given).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert model.is_gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_labels_change_the_prediction():
    model = build("classes")
    sample, timestep, _ = inputs(model)
    zero, one = (model(sample, timestep, torch.full((3,), label)).sample for label in (0, 1))
    assert not torch.allclose(zero, one, rtol=1e-3, atol=1e-3)


def test_fourier_features_are_those_of_the_formula():
    z = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    features = FourierFeatures([0, 7])(z.float())
    angles = torch.pi * z.float().double()
    expected = torch.cat([z, angles.sin(), (128 * angles).sin(), angles.cos(), (128 * angles).cos()], dim=1)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_fourier_features_and_sinusoids_stay_in_float32(cast):
    model = build("paper")
    seen: dict[str, list[Tensor]] = {"features": [], "linear": []}
    model.input_features.register_forward_hook(lambda _, __, output: seen["features"].append(output))
    model.mid_blocks[0].register_forward_hook(lambda _, __, output: seen["linear"].append(output))
    sample, timestep, _ = inputs(model)
    model(sample, timestep)
    exact = model.time_embedding.sinusoids(timestep)
    if cast == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        output = model(sample, timestep).sample
        assert torch.equal(model.time_embedding.sinusoids(timestep), exact)
    assert torch.equal(*seen["features"])
    assert seen["linear"][1].dtype == torch.bfloat16
    assert output.dtype == torch.float32


def test_it_can_be_pickled_and_its_example_holds():
    model = build("paper")
    sample, timestep, _ = inputs(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(sample, timestep).sample, model(sample, timestep).sample)
    # The public class answers to the package's name, where doctest does not look by itself.
    assert UNetVDMModel.__module__ == "vdm_hub"
    (example,) = doctest.DocTestFinder(recurse=False).find(UNetVDMModel, module=False, globs=globals().copy())
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))
    assert example.examples


def test_every_argument_is_in_the_config():
    names = set(inspect.signature(UNetVDMModel.__init__).parameters) - {"self"}
    assert names <= set(UNetVDMModel(**SMALL).config)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 9)])
def test_sizes_that_the_resolutions_do_not_divide_are_refused(size):
    with pytest.raises(ConfigurationError, match=naming(f"{size[0]}x{size[1]}", 2)):
        build("two_resolutions")(torch.zeros(1, 1, *size), torch.zeros(1))


def test_odd_sizes_are_fine_without_downsampling():
    assert build("paper")(torch.zeros(1, 3, 7, 5), torch.zeros(1)).sample.shape == (1, 3, 7, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": ()}, ("block_out_channels", "()")),
        ({"block_out_channels": (12,)}, ("norm_num_groups", 8)),
        ({"norm_num_groups": 0}, ("norm_num_groups", 0)),
        ({"attention_head_dim": 5}, ("attention_head_dim", 5)),
        ({"attention_levels": (1,)}, ("attention_levels", "[1]")),
        ({"resnet_time_scale_shift": "scale_shft"}, ("default", "scale_shift")),
        ({"in_channels": 2}, ("add_input",)),
        ({"num_train_timesteps": 1}, ("num_train_timesteps", 1)),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=naming(*message)):
        UNetVDMModel(**(SMALL | changes))


@pytest.mark.parametrize(("name", "labels"), [("classes", None), ("paper", torch.zeros(3, dtype=torch.long))])
def test_labels_without_classes_and_classes_without_labels_are_refused(name, labels):
    model = build(name)
    sample, timestep, _ = inputs(model)
    with pytest.raises(ConfigurationError, match="class_labels"):
        model(sample, timestep, labels)


# ---- a vector beside the timestep -----------------------------------------------------------------------------------


def test_a_context_is_told_beside_the_timestep_and_trains_whoever_gives_it():
    model = build("paper", context_size=3)
    sample, timestep, _ = inputs(model)
    context = torch.randn(len(sample), 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    output = model(sample, timestep, context=context).sample
    assert bool((output != model(sample, timestep, context=context.roll(1, 0)).sample).flatten(1).any(1).all())
    (gradient,) = torch.autograd.grad(output.square().sum(), context)
    assert bool(gradient.isfinite().all()) and bool((gradient != 0).all())
    torch.testing.assert_close(model(sample[:1], 3.0, context=context[:1]).sample.shape, sample[:1].shape)


@pytest.mark.parametrize(("size", "given"), [(None, 3), (3, None), (3, 4)])
def test_a_context_that_the_network_does_not_take_is_refused(size: int | None, given: int | None):
    model = build("paper", context_size=size)
    sample, timestep, _ = inputs(model)
    with pytest.raises(ConfigurationError, match=naming("context_size", size)):
        model(sample, timestep, context=None if given is None else torch.zeros(len(sample), given))


@pytest.mark.parametrize(
    "context", [torch.zeros(1, 3), torch.zeros(5, 3), torch.zeros(3), torch.zeros(2, 1, 3), [[0.0]]]
)
def test_a_context_is_one_vector_for_each_image(context: Any):
    model = build("paper", context_size=3)
    sample, timestep, _ = inputs(model)
    with pytest.raises(ConfigurationError, match="context"):
        model(sample[:2], timestep[:2], context=context)


# ---- a caption ------------------------------------------------------------------------------------------------------

TEXTS = ("text", "text_everywhere")


@pytest.mark.parametrize("name", TEXTS)
def test_a_caption_changes_nothing_at_the_start_and_no_first_weight(name: str):
    captioned, plain = build(name, randomise=False), build(name, randomise=False, cross_attention_dim=None)
    own = plain.state_dict()
    assert all(torch.equal(captioned.state_dict()[key], value) for key, value in own.items())
    assert {key.split(".")[-3] for key in captioned.state_dict().keys() - own.keys()} == {"cross_attention"}
    for parameter in captioned.conv_out.parameters():
        nn.init.normal_(parameter)
    plain.conv_out.load_state_dict(captioned.conv_out.state_dict())
    sample, timestep, given = inputs(captioned)
    assert torch.equal(captioned(sample, timestep, **given).sample, plain(sample, timestep).sample)


@pytest.mark.parametrize(("name", "places"), [("text", 1), ("text_everywhere", 1 + 2 + 3)])
def test_a_caption_is_attended_to_in_the_middle_and_after_each_attention_of_a_level(name: str, places: int):
    blocks = [block for block in build(name).modules() if getattr(block, "cross_attention", None) is not None]
    assert len(blocks) == places


@pytest.mark.parametrize("name", TEXTS)
def test_each_token_counts_where_the_mask_says_so_and_nowhere_else(name: str):
    model = build(name)
    sample, timestep, given = inputs(model)
    states, mask = given["encoder_hidden_states"].requires_grad_(), given["encoder_attention_mask"]
    output = model(sample, timestep, **given).sample
    (gradient,) = torch.autograd.grad(output.square().sum(), states)
    assert torch.equal(gradient.any(2), mask)
    no_padding = model(sample[-1:], timestep[-1:], encoder_hidden_states=states[-1:, :3]).sample
    torch.testing.assert_close(no_padding, output[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_an_image_whose_tokens_are_all_hidden_is_told_nothing_and_disturbs_no_other(name: str):
    model = build(name)
    sample, timestep, given = inputs(model)
    states, mask = given["encoder_hidden_states"].requires_grad_(), given["encoder_attention_mask"].clone()
    expected = model(sample, timestep, **given).sample
    mask[1] = False
    output = model(sample, timestep, encoder_hidden_states=states, encoder_attention_mask=mask).sample
    assert torch.equal(output[[0, 2]], expected[[0, 2]]) and not torch.allclose(output[1], expected[1])
    silent = model(sample[1:2], timestep[1:2], encoder_hidden_states=torch.zeros_like(states[1:2])).sample
    torch.testing.assert_close(output[1:2], silent, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    gradients = [states.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients) and not bool(states.grad[1].any())


def test_the_divergence_of_a_captioned_network_is_that_of_its_jacobian():
    model = build("text").double()
    sample, timestep, given = (one.double() if isinstance(one, Tensor) else one for one in inputs(model, 1, 4))
    given["encoder_hidden_states"] = given["encoder_hidden_states"].double()
    probe = torch.randn(sample.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z = sample.requires_grad_()
    output = model(z, timestep, **given).sample
    (product,) = torch.autograd.grad(output, z, probe)
    step = 1e-6 * probe
    with torch.no_grad():
        change = model(z + step, timestep, **given).sample - model(z - step, timestep, **given).sample
    assert float((probe * change).sum()) / 2e-6 == pytest.approx(float((product * probe).sum()), rel=1e-6)


STATES, MASK = torch.zeros(3, 5, 12), torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "states", "mask", "named"),
    [
        ("paper", STATES, None, ("cross_attention_dim", "(3, 5, 12)")),
        ("paper", None, MASK, ("cross_attention_dim",)),
        ("text", None, None, ("cross_attention_dim", 12)),
        ("text", None, MASK, ("cross_attention_dim", 12)),
        ("text", STATES[..., :7], None, ("encoder_hidden_states", "(3, 5, 7)", 12)),
        ("text", STATES[:2], None, ("encoder_hidden_states", "(2, 5, 12)", "3 images")),
        ("text", STATES[:, :0], None, ("encoder_hidden_states", "(3, 0, 12)")),
        ("text", STATES[:, 0], None, ("encoder_hidden_states", "(3, 12)")),
        ("text", STATES.long(), None, ("encoder_hidden_states", "torch.int64")),
        ("text", [[0.0]], None, ("encoder_hidden_states", "list")),
        ("text", STATES, MASK[:, :4], ("encoder_attention_mask", "(3, 4)", "(3, 5)")),
        ("text", STATES, MASK[:1], ("encoder_attention_mask", "(1, 5)", "(3, 5)")),
        ("text", STATES, MASK.float(), ("encoder_attention_mask", "torch.float32")),
        ("text", STATES, MASK.tolist(), ("encoder_attention_mask", "list")),
    ],
)
def test_a_caption_that_does_not_fit_is_refused(name: str, states: Any, mask: Any, named: tuple[Any, ...]):
    model = build(name)
    sample, timestep, _ = inputs(model)
    with pytest.raises(ConfigurationError, match=naming(*named)):
        model(sample, timestep, encoder_hidden_states=states, encoder_attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_any_precision_are_taken(dtype: torch.dtype):
    model = build("text")
    sample, timestep, given = inputs(model)
    exact = given["encoder_hidden_states"].to(dtype).float()
    expected = model(sample, timestep, **given | {"encoder_hidden_states": exact}).sample
    found = model(sample, timestep, **given | {"encoder_hidden_states": exact.to(dtype)}).sample
    assert torch.equal(found, expected)
    assert model.to(torch.bfloat16)(sample, timestep, **given).sample.isfinite().all()


@pytest.mark.slow
def test_a_captioned_network_is_one_graph():
    model = build("text_everywhere")
    sample, timestep, given = inputs(model)
    expected = model(sample, timestep, **given).sample
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sample, timestep, **given).sample, expected, rtol=1e-4, atol=1e-5)


# ---- the first weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_weights_are_those_of_the_reference_code(variant: str):
    """Normal of variance 1/fan_in, cut at two deviations of the uncut one; zero are biases and what ends a branch."""
    drawn, model = [], build(variant, randomise=False, block_out_channels=(64, 64), norm_num_groups=8)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert layer.bias is None or not bool(layer.bias.any()), name
        ends_a_branch = name.rpartition(".")[2] in ("conv2", "conv_out", "time_emb_proj", "to_out")
        ends_a_branch |= "class_embedding" in name  # which the reference code does not have
        assert bool(layer.weight.any()) != ends_a_branch, name
        if not ends_a_branch:
            drawn.append((layer.weight * layer.weight[0].numel() ** 0.5).detach().flatten())
    values = torch.cat(drawn).double()
    # Of some 1e5 draws: the deviation of their own deviation is below 1e-3 times 0.7.
    assert float(values.std()) == pytest.approx(1, abs=0.01) and float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.abs().max()) == pytest.approx(2 / 0.8796256610342398, rel=1e-3)
