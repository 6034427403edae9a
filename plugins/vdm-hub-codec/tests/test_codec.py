"""What is encoded comes back, by whatever model; its length is the bound; what is not whole is refused."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from vdm_hub import (
    AutoencoderKLFirstStage,
    ConfigurationError,
    DataError,
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    NonFiniteLossError,
    UNetVDMModel,
    VariationalBound,
    VDMObjective,
    VDMPipeline,
    VDMScheduler,
)
from vdm_hub_codec import decode, encode
from vdm_hub_codec.blocks import Coder
from vdm_hub_codec.chains import Chain
from vdm_hub_codec.container import Container
from vdm_hub_codec.decisions import Decisions
from vdm_hub_codec.distributions import Normal
from vdm_hub_codec.pictures import is_shorter, levels_of, picture_of
from vdm_hub_codec.progressive import progress_of
from vdm_hub_codec.spacing import StepCosts, times_of
from vdm_hub_codec.stack import Stack

K, T = 17, 8
UNET: dict[str, Any] = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
STAGE: dict[str, Any] = {"in_channels": 1, "num_levels": K, "block_out_channels": (8,), "norm_num_groups": 4}


def randomised(network: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def unet(channels: int = 1, size: int = 8) -> UNetVDMModel:
    torch.manual_seed(0)
    return randomised(UNetVDMModel(sample_size=size, in_channels=channels, out_channels=channels, **UNET))


def told(dropout: float = 0.1, **config: Any) -> VDMPipeline:
    """A model that is told one of three classes."""
    torch.manual_seed(0)
    network = randomised(UNetVDMModel(8, in_channels=1, out_channels=1, num_class_embeds=3 + (dropout > 0), **UNET))
    classes = {"count": 3, "names": ["cat", "dog", "eel"], "dropout": dropout, "column": "animal"}
    return VDMPipeline(network, VDMScheduler(**{"num_levels": K} | config), classes=classes)


def vdm(**config: Any) -> VDMPipeline:
    return VDMPipeline(unet(), VDMScheduler(**{"num_levels": K} | config))


def hierarchy(*shapes: tuple[int, ...]) -> HVAEPipeline:
    return HVAEPipeline(randomised(MarkovianHVAE(8, depth=len(shapes), latent_shapes=shapes, **STAGE)))


def latent(stage: Any) -> LatentVDMPipeline:
    channels, size = stage.latent_shape[0], stage.latent_shape[-1] if len(stage.latent_shape) > 1 else 1
    scheduler = VDMScheduler(num_levels=K, noise_schedule={"name": "linear", "config": {"gamma_min": -5.0}})
    scaling = {"shift": [0.1], "scale": [1.3]}
    return LatentVDMPipeline(randomised(stage), unet(channels, size), scheduler, latent_scaling=scaling)


def autoencoder() -> AutoencoderKLFirstStage:
    config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    return AutoencoderKLFirstStage(config | {"latent_channels": 2}, sample_size=8, num_levels=K)


BITS = {"name": "binomial", "package": "vdm-hub-binomial"}
TABLE = {"name": "tabulated", "config": {"times": [0.0, 0.4, 1.0], "gammas": [-9.0, -2.0, 4.0]}}
MODELS: dict[str, Any] = {
    "linear": lambda: vdm(),
    "cosine, velocity": lambda: vdm(noise_schedule="cosine", prediction_type="v_prediction"),
    "learned, data": lambda: vdm(noise_schedule="learned_monotone", prediction_type="sample"),
    "hierarchy": lambda: HVAEPipeline(
        randomised(MarkovianHVAE(8, depth=3, latent_shapes=[(2, 4, 4), (4,), (3,)], **STAGE))
    ),
    "vae": lambda: HVAEPipeline(randomised(MarkovianHVAE(8, latent_shapes=[(2, 4, 4)], **STAGE))),
    "latent": lambda: latent(MarkovianHVAE(8, latent_shapes=[(2, 4, 4)], **STAGE)),
    "latent, autoencoder": lambda: latent(autoencoder()),
    "bits": lambda: vdm(num_levels=2, forward_process=BITS),
}


def levels(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(count, 1, 3, 3, generator=generator)
    return (torch.nn.functional.interpolate(smooth, 8, mode="bicubic") * 3 + 8).round().clamp(0, K - 1).long()


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def transitions(pipe: Any) -> int | None:
    return None if isinstance(pipe, HVAEPipeline) else T


@pytest.mark.parametrize("name", MODELS)
def test_data_come_back_on_other_threads_and_batches(name: str) -> None:
    pipe = made(name)
    data = levels() * pipe.num_levels // K
    whole, report = encode(pipe, data, transitions=transitions(pipe), batch_size=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(decode(made(name), whole, batch_size=3).levels, data)
    finally:
        torch.set_num_threads(threads)
    assert report.bytes == len(whole) and report.count == len(data)


@pytest.mark.parametrize("name", ["linear", "bits"])
def test_a_block_is_decoded_by_itself(name: str) -> None:
    pipe = made(name)
    data = levels(11) % pipe.num_levels
    whole, _ = encode(pipe, data, transitions=T, block=4)
    for numbers in ([1], [2, 0], [0, 1, 2], range(2), np.array([2, 1]), torch.tensor([0])):
        found = decode(pipe, whole, blocks=numbers).levels
        assert found is not None and torch.equal(found, torch.cat([data.split(4)[number] for number in numbers]))
    wrong: Any
    for wrong in ([3], [-1], [], [True], [0.0], 3, "1", torch.tensor(1), np.array([0.5])):
        with pytest.raises(ConfigurationError, match="from 0 to 2"):
            decode(pipe, whole, blocks=wrong)


def test_what_is_no_model_no_name_and_no_data_is_refused() -> None:
    pipe, data, wrong = made("linear"), levels(3), Any
    whole, _ = encode(pipe, data, transitions=T, name=Path("me/digits"))
    assert torch.equal(decode(pipe, whole).levels, data) and Container.from_bytes(whole).model == "me/digits"
    for wrong in ("runs/digits", None, pipe.unet):
        for call in (lambda wrong=wrong: encode(wrong, data), lambda wrong=wrong: decode(wrong, whole)):
            with pytest.raises(ConfigurationError, match=type(wrong).__name__):
                call()
    for wrong in (None, 3, b"name"):
        with pytest.raises(ConfigurationError, match="name is"):
            encode(pipe, data, transitions=T, name=wrong)
    for wrong in (torch.tensor(3), np.array(3), np.int64(3), [[3]]):
        with pytest.raises(DataError, match="data are"):
            encode(pipe, wrong, transitions=T)


@pytest.mark.parametrize("name", ["linear", "bits"])
def test_every_evaluation_of_the_network_is_counted(name: str) -> None:
    """Those of the spacing, of the bins and of draws that had too few bits, too."""
    pipe, asked = made(name), list[int]()
    pipe.unet.register_forward_hook(lambda module, given, output: asked.append(len(output[0])))
    data = levels(60) * pipe.num_levels // K
    report = encode(pipe, data, transitions=T)[1]
    assert report.evaluations == sum(asked) > T * (60 - report.started)


def test_where_nothing_is_drawn_there_is_no_bound() -> None:
    report = encode(made("linear"), levels(1), transitions=T)[1]
    assert report.started == 1 and (report.bound, report.standard_error_over_data, report.overhead) == (None,) * 3
    assert report.bits_per_dim == pytest.approx(report.start + report.labels + report.header)
    assert "not used" in str(report) and "above" not in str(report)
    some = encode(made("linear"), levels(60), transitions=T)[1]
    assert "5.00% below the bound" in str(replace(some, overhead=-0.05))
    assert some.bound is not None and f"of the {some.started} images that are there as they are" in str(some)


class Alphabet(torch.nn.Module):
    """The exact network, which predicts the noise, of independent pixels with K levels of known probabilities."""

    def __init__(self, process: Any, probabilities: Tensor) -> None:
        super().__init__()
        self.process, self.probabilities = process, probabilities.double()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        gamma = self.process.conditioning.inverse(timestep.double()).reshape(-1, 1, 1, 1, 1)
        alpha, variance = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)
        x = self.process.scaling.encode(torch.arange(K), torch.float64)
        away = sample.double().unsqueeze(-1) - alpha * x
        posterior = (self.probabilities.log() - 0.5 * away**2 / variance).softmax(-1)
        return ((away * posterior).sum(-1) / variance[..., 0].sqrt(),)


PROBABILITIES = torch.arange(1, K + 1).double() ** 2 / sum(k**2 for k in range(1, K + 1))


@pytest.fixture(scope="module")
def exact() -> tuple[Chain, Tensor, VDMObjective]:
    objective = VDMObjective(torch.nn.Identity(), VDMScheduler(num_levels=K).process.double(), transitions=60)
    objective.network = Alphabet(objective.process, PROBABILITIES)
    drawn = torch.multinomial(PROBABILITIES, 64 * 64, True, generator=torch.Generator().manual_seed(0))
    return Chain.of_objective(objective, (1, 8, 8)), drawn.reshape(64, 1, 8, 8), objective


def test_latents_lie_where_wide_steps_cost_most(exact: Any) -> None:
    """Of the exact model: shorter than equal steps, by the bound on the draws of either file, as long as foretold."""
    _, data, objective = exact
    pipe: Any = SimpleNamespace(
        process=objective.process, objective=partial(VDMObjective, objective.network, objective.process)
    )
    costs: Any = StepCosts.of(pipe, data)
    spacing = costs.spacing(20)
    assert spacing is not None and len(times_of(spacing, 20)) == 21
    found = {}
    for spaced in (None, spacing):
        chain = Chain.of_objective(VDMObjective(objective.network, objective.process, 20), (1, 8, 8), spaced)
        coder = Coder(chain.with_bins_for(data.numpy()), 64)
        coder.encode(data.numpy())
        found[spaced] = coder.lengths.chain / (len(data) - coder.lengths.started) / 64
        assert found[spaced] == pytest.approx(costs.bits_per_dim(20, spaced), rel=0.08)  # of 17 times, 32 data
    assert found[spacing] < 0.97 * found[None]  # their noise is half a percent


@pytest.mark.parametrize("steps", [20, 160])
def test_a_picture_s_lengths_are_the_bound_within_their_error(exact: Any, steps: int) -> None:
    _, data, objective = exact
    pipe: Any = SimpleNamespace(
        process=objective.process, objective=partial(VDMObjective, objective.network, objective.process)
    )
    costs: Any = StepCosts.of(pipe, data, None, 16)
    bound = collect_bound(VDMObjective(objective.network, objective.process, steps), data[:32])
    error = costs.standard_error(steps, None)
    assert 0 < error < 0.02 * bound and costs.bits_per_dim(steps, None) == pytest.approx(bound, abs=4 * error)


def test_what_is_known_on_the_way_grows_into_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a latent adds is its term of the bound, on a draw."""
    monkeypatch.setattr("vdm_hub_codec.images.StepCosts.of", lambda *_: None)  # equal steps
    steps, pipe, data = 40, made("linear"), levels(40)
    whole = encode(pipe, data, transitions=steps)[0]
    progress = progress_of(pipe, whole, columns=steps + 1)
    last = Container.from_bytes(whole).blocks[0].batches[-1]
    assert torch.equal(progress.estimates[-1], data[-last:][:8]) and progress.error[-1] == 0
    rates = np.array(progress.bits_per_dim)
    assert len(rates) == steps + 2 and abs(rates[0]) < 0.05  # the prior's
    # Of |eps - eps_hat|^2 in so many dimensions: four standard deviations of the ratio; the bins are in the rest.
    tolerance = 4 * math.sqrt(2 / data[-last:].numel())
    np.testing.assert_allclose(np.diff(rates)[:-1], _terms(pipe, data[-last:], steps), rtol=tolerance, atol=0.05)
    progress.save(tmp_path / "steps.png", K)
    assert (tmp_path / "steps.png").stat().st_size > 1000
    other = made("hierarchy")
    with pytest.raises(ConfigurationError, match="gamma"):
        progress_of(other, encode(other, data)[0])


def _terms(pipe: Any, data: Tensor, steps: int) -> Any:
    """The bits/dim of each step, from the noisiest, by the mean of ten draws (VDM eq. 13)."""
    objective, batch, found = pipe.objective(steps), {"levels": data}, []
    for step in reversed(range(steps)):
        time, total = torch.full((len(data),), (step + 0.5) / steps), 0.0
        for seed in range(10):
            noise = objective.draw_noise(batch, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                total += float(objective(batch, time, noise).terms["diffusion"].mean()) / steps / 10
        found.append(total / data[0].numel() / math.log(2))
    return np.array(found)


def test_a_block_starts_with_pictures_where_they_are_shorter() -> None:
    pipe = VDMPipeline(unet(3, 16), VDMScheduler(num_levels=256))
    ramp = torch.arange(16) * 12
    data = (ramp[:, None] + ramp).div(2, rounding_mode="floor").expand(6, 3, 16, 16).clone()
    data += torch.arange(6)[:, None, None, None]
    whole = encode(pipe, data, transitions=4)[0]
    assert Container.from_bytes(whole).coder["pictures"] and torch.equal(decode(pipe, whole).levels, data)
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128))
    assert len(picture_of(noise)) < 1 << 16 and not is_shorter(np.zeros((3, 129, 128), dtype=np.int64), 256)
    with pytest.raises(ValueError, match="picture"):
        levels_of(b"RIFF", (3, 16, 16))
    with pytest.raises(ValueError, match="picture"):
        levels_of(picture_of(data[0].numpy()), (3, 8, 8))


def test_the_length_is_the_bound_on_the_same_draws_and_above_the_entropy(exact: Any) -> None:
    chain, data, objective = exact
    coder = Coder(chain.with_bins_for(data.numpy()), 64)
    block = coder.encode(data.numpy())
    lengths, share = coder.lengths, 1 - coder.lengths.started / 64
    # The stack counts whole words of 32 bits.
    assert lengths.pushed == pytest.approx(lengths.chain, rel=2e-3, abs=64)
    bound = lengths.chain / share / data.numel()
    entropy = -float((PROBABILITIES.log2()[data]).mean())
    measured = collect_bound(objective, data)
    assert entropy < bound == pytest.approx(measured, rel=0.03)
    assert np.array_equal(Coder(coder.chain, 7).decode(block), data.numpy())


class Table(torch.nn.Module):
    """Logits of each site, by its own value and its neighbours' sum, without being told the time."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(k, k, k, generator=torch.Generator().manual_seed(0)))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        k, ids = len(self.table), sample.long()
        return (self.table[(ids.roll(1, 1) + ids.roll(-1, 1)) % k, ids],)


def test_latents_of_values_come_back_and_cost_the_bound() -> None:
    process = VDMScheduler(num_levels=5, forward_process={"name": "uniform", "package": "vdm-hub-tokens"}).process
    objective = VDMObjective(Table(5), process, transitions=6)
    data = torch.randint(0, 5, (400, 8), generator=torch.Generator().manual_seed(0))
    coder = Coder(Chain.of_objective(objective, (8,)), 64)
    block = coder.encode(data.numpy())
    assert np.array_equal(Coder(coder.chain, 7).decode(block), data.numpy())
    lengths, share = coder.lengths, 1 - coder.lengths.started / 400
    assert lengths.pushed == pytest.approx(lengths.chain, rel=2e-3, abs=64)
    # Of 400 texts, of one draw each: an error of about a hundredth.
    assert lengths.chain / share / data.numel() == pytest.approx(collect_bound(objective, data), rel=0.03)


def collect_bound(objective: VDMObjective, data: Tensor) -> float:
    """The bound of all transitions, by one draw of each, bits/dim."""
    total, generator = 0.0, torch.Generator().manual_seed(1)
    transitions = objective.transitions or 0
    with torch.no_grad():
        for number in range(transitions):
            batch = {"levels": data}
            times = torch.full((len(data),), (number + 0.5) / transitions, dtype=torch.float64)
            terms = objective(batch, times, objective.draw_noise(batch, generator)).terms
            total += sum(float(term.mean()) for term in terms.values()) / transitions
    return total / data[0].numel() / math.log(2)


def test_bits_are_as_good_as_random_before_they_are_drawn() -> None:
    """What is drawn behind latents that all lie at their means is a normal all the same, and comes back."""
    ones = np.ones((50, 100))
    normals = Normal(0 * ones, ones, 0.25).decided(1, True, np.arange(50), Decisions())
    stack = Stack()
    stack.push_levels(np.arange(20_000) % K, K)
    normals.push(stack, np.zeros((50, 100), dtype=np.int64))
    before = stack.words()
    bins = normals.draw(stack, seed=3)
    assert abs(0.25 * bins.mean()) < 4 / 5000**0.5 and (0.25 * bins).std() == pytest.approx(1, abs=0.05)
    normals.undraw(stack, bins, seed=3)
    assert np.array_equal(stack.words(), before)


def test_a_latent_that_is_out_of_all_reach_is_refused() -> None:
    ones = np.ones((1, 4))
    normals = Normal(0 * ones, ones, 0.25).decided(1, True, np.arange(1), Decisions())
    stack, far = Stack(), np.array([[0, 1, 2, 2**21]])
    normals.push(stack, far)
    assert np.array_equal(normals.pop(stack), far)
    with pytest.raises(DataError, match="2,097,152,000"):
        normals.push(stack, 1000 * far)


def damaged(whole: bytes, count: int, *, mended: bool = False) -> Iterator[bytes]:
    """The file with another byte in a random place; with its checksum mended, as no storage would."""
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole) - 4 * mended, count):
        other = bytearray(whole)
        other[place] ^= int(generator.integers(1, 256))
        yield bytes(other[:-4]) + struct.pack("<I", zlib.crc32(other[:-4])) if mended else bytes(other)


def test_every_damaged_byte_is_refused() -> None:
    pipe = told()
    whole, _ = encode(pipe, levels(), LABELS, transitions=T)
    for one in damaged(whole, 1000):
        with pytest.raises(DataError):
            decode(pipe, one)
    for end in (0, 3, 8, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError):
            decode(pipe, whole[:end])


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_damage_behind_a_right_checksum_is_refused_too(count: int) -> None:
    """As a machine with other numbers would find it: nothing is decoded to something else silently."""
    pipe = told()
    whole, _ = encode(pipe, levels(), LABELS, transitions=2)
    for one in damaged(whole, count, mended=True):
        with pytest.raises(DataError):
            decode(pipe, one)


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "sound"},
        {"transitions": 0},
        {"transitions": "8"},
        {"spacing": "00"},
        {"widths": [0.5]},
        {"labels": 3},
        {"what": 1},
    ],
)
def test_a_description_that_no_encoder_makes_is_refused(changed: Any) -> None:
    whole, _ = encode(told(), levels(), LABELS, transitions=T)
    container = Container.from_bytes(whole)
    other = replace(container, coder=container.coder | changed)
    with pytest.raises(DataError, match=re.escape(next(iter(changed)))):
        Container.from_bytes(other.to_bytes())
    block = container.blocks[0]
    for wrong in (replace(block, count=3), replace(block, batches=[-1]), replace(block, notes=[("a",)])):
        with pytest.raises(DataError):
            Container.from_bytes(replace(container, blocks=[wrong]).to_bytes())


def test_another_model_other_data_and_models_without_a_chain_are_refused() -> None:
    pipe, data = made("linear"), levels(4)
    whole, _ = encode(pipe, data, transitions=T, name="me/digits")
    with pytest.raises(DataError, match="me/digits"):
        decode(made("cosine, velocity"), whole)
    same_weights = UNetVDMModel(**{**pipe.unet.config, "norm_num_groups": 2})
    same_weights.load_state_dict(pipe.unet.state_dict())
    with pytest.raises(DataError, match="me/digits"):
        decode(VDMPipeline(same_weights.eval(), pipe.scheduler), whole)
    with_labels = encode(told(), data, torch.tensor([0, 1, 2, 0]), transitions=T)[0]
    other_names = told()
    other_names.register_to_config(classes={**other_names.config["classes"], "names": ["z", "y", "x"]})
    with pytest.raises(DataError, match="another"):
        decode(other_names, with_labels)
    with pytest.raises(DataError, match="8x8"):
        encode(pipe, torch.zeros(2, 1, 9, 8, dtype=torch.long), transitions=T)
    with pytest.raises(DataError, match="17"):
        encode(pipe, torch.full((2, 1, 8, 8), 17), transitions=T)
    for wrong in (data.float(), data[:0], -data - 1):
        with pytest.raises(DataError, match="whole numbers"):
            encode(pipe, wrong, transitions=T)
    for number in ({"transitions": 0}, {"block": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(number))} is 0"):
            encode(pipe, data, **{"transitions": T} | number)
    with pytest.raises(ConfigurationError, match="transitions is 3"):
        encode(made("vae"), data, transitions=3)


def test_weights_that_are_not_finite_are_refused() -> None:
    pipe = vdm()
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="weights"):
        encode(pipe, levels(4), transitions=T)


def test_unsigned_levels_of_any_width_are_taken() -> None:
    pipe, data = made("linear"), levels(3)
    whole, _ = encode(pipe, data, transitions=T)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.int16):
        assert encode(pipe, data.to(dtype), transitions=T)[0] == whole


def test_arrays_and_other_bytes_are_taken_and_other_things_refused() -> None:
    pipe, data = told(), levels()
    whole = encode(pipe, data.numpy().astype(np.uint8), LABELS.numpy(), transitions=T)[0]
    assert whole == encode(pipe, data, LABELS, transitions=T)[0]
    for other in (bytearray(whole), memoryview(whole)):
        assert torch.equal(decode(pipe, other).levels, data)
    wrong: Any
    for wrong in (data.tolist(), data.numpy().astype(str), data.numpy() / 2, None):
        with pytest.raises(DataError, match="whole numbers"):
            encode(pipe, wrong, LABELS, transitions=T)
    with pytest.raises(DataError, match="labels"):
        encode(pipe, data, ["cat"] * 12, transitions=T)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="str"):
        decode(pipe, "file.vdmz")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="1000000"):
        encode(pipe, data, LABELS, transitions=10**6)


def test_a_file_that_says_more_than_it_can_hold_is_refused_before_it_takes_memory() -> None:
    pipe = made("linear")
    container = Container.from_bytes(encode(pipe, levels(60), transitions=T)[0])
    block = container.blocks[0]
    crafted = {"count": replace(block, count=1 << 32), "batches": replace(block, count=1 << 20, batches=[1 << 20])}
    crafted["as they are"] = replace(block, count=100_000 + 64 * len(block.words))
    for one in crafted.values():
        with pytest.raises(DataError, match="several files"):
            replace(container, blocks=[one]).to_bytes()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("vdm_hub_codec.container._may_hold", lambda *_: True)
            whole = replace(container, blocks=[one]).to_bytes()
        with pytest.raises(DataError, match="block"):
            decode(pipe, whole)
    black = torch.zeros(400, 1, 8, 8, dtype=torch.long)  # next to no bits at all, and in a file of few bytes
    assert torch.equal(decode(pipe, encode(pipe, black, transitions=T, block=1)[0]).levels, black)


def test_a_number_of_transitions_that_the_model_has_not_is_damage() -> None:
    for name, transitions in (("vae", 5), ("linear", None)):
        pipe = made(name)
        whole = encode(pipe, levels(4), transitions=None if name == "vae" else T)[0]
        container = Container.from_bytes(whole)
        other = replace(container, coder=container.coder | {"transitions": transitions}).to_bytes()
        with pytest.raises(DataError, match=f"T = {transitions}.*damaged"):
            decode(pipe, other)


MULAN = {"name": "mulan", "package": "vdm-hub-mulan", "config": {"shape": [1, 8, 8]}}


@pytest.mark.parametrize(
    ("config", "said"),
    [({"noise_schedule": MULAN}, "MulanSchedule"), ({"decoder": "ddpm"}, "factorised")],
    ids=["mulan", "ddpm"],
)
def test_what_has_no_chain_is_refused_with_a_word_of_files(config: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        encode(vdm(**config), levels(4))
    assert "a file is made by" in str(caught.value) and "method=" not in str(caught.value)


def test_a_checkpoint_whose_sampler_clips_makes_a_file_without_clipping_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "in_channels": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(8, out_channels=1, **sizes, **blocks)
    checkpoint = DDPMPipeline(network, DDPMScheduler(num_train_timesteps=20, clip_sample=True))
    with pytest.raises(ConfigurationError, match="factorised"):
        encode(VDMPipeline.from_diffusers(checkpoint, K), levels(4))
    VDMPipeline.from_diffusers(checkpoint, K, decoder="factorised").save_pretrained(tmp_path)
    pipe = VDMPipeline.from_pretrained(tmp_path)
    whole, report = encode(pipe, levels(20), transitions=T)
    assert report.started < 20 and any("without clipping" in note for note in report.notes)
    assert torch.equal(decode(pipe, whole).levels, levels(20))


def test_sites_at_once_of_images_is_refused_and_a_model_without_a_name_is_said_to_be() -> None:
    with pytest.raises(ConfigurationError, match="sites_at_once is 4"):
        encode(made("linear"), levels(4), sites_at_once=4)
    whole = encode(made("linear"), levels(2), transitions=T)[0]
    with pytest.raises(DataError, match="without a name"):
        decode(made("cosine, velocity"), whole)


LABELS = torch.tensor([0, 2, 2, 1, 2, 0, 2, 2, 2, 1, 0, 2])


@pytest.mark.parametrize("config", [{}, {"num_levels": 2, "forward_process": BITS}], ids=["vdm", "bits"])
def test_classes_come_back_and_are_told(config: Any) -> None:
    """Each is told its own, whatever the batch and the block; other classes make another bound."""
    pipe = told(**config)
    data, labels = levels(120) * pipe.num_levels // K, LABELS.repeat(10)
    whole, report = encode(pipe, data, labels, transitions=T, batch_size=30, block=70)
    found = decode(pipe, whole, batch_size=64)
    assert torch.equal(found.levels, data) and torch.equal(found.labels, labels)
    assert report.bound is not None
    parts = [report.bound, report.start, report.quantisation, report.labels, report.header]
    assert report.bits_per_dim == pytest.approx(sum(parts))
    # By counts: Krichevsky and Trofimov's mixture, whose length has a closed form.
    expected = sum(_length_of_labels(part) for part in labels.split(70))
    assert report.labels * data.numel() == pytest.approx(expected)
    other = encode(pipe, data, labels * 0, transitions=T, batch_size=30, block=70)[1]
    assert other.bound != pytest.approx(report.bound, rel=1e-6) and other.labels < report.labels


def test_a_latent_model_is_told_classes_too() -> None:
    torch.manual_seed(0)
    stage = randomised(MarkovianHVAE(8, latent_shapes=[(2, 4, 4)], **STAGE))
    network = randomised(UNetVDMModel(4, in_channels=2, out_channels=2, num_class_embeds=3, **UNET))
    classes = {"count": 3, "names": None, "dropout": 0.0, "column": "label"}
    scaling = {"shift": [0.1], "scale": [1.3]}
    pipe = LatentVDMPipeline(stage, network, VDMScheduler(num_levels=K), latent_scaling=scaling, classes=classes)
    whole, report = encode(pipe, levels(), LABELS, transitions=T)
    found = decode(pipe, whole, batch_size=3)
    assert torch.equal(found.levels, levels()) and torch.equal(found.labels, LABELS) and report.evaluations


def _length_of_labels(labels: Tensor) -> float:
    """Of a Dirichlet mixture with one half of each class, in bits."""
    counts, half = torch.bincount(labels, minlength=3).double(), torch.tensor(0.5).double()
    nats = torch.lgamma(counts + half).sum() - torch.lgamma(counts.sum() + 1.5) + torch.lgamma(3 * half)
    return -float(nats - 3 * torch.lgamma(half)) / math.log(2)


def test_the_bound_of_classes_is_the_models() -> None:
    pipe, data = told(), levels(200)
    labels = torch.arange(200) % 3
    report = encode(pipe, data, labels, transitions=40)[1]
    measured = pipe.log_likelihood(data, VariationalBound(transitions=40), class_labels=labels, replicates=8)
    assert report.bound is not None
    assert report.bound < measured.bits_per_dim * 1.03  # which has equal steps, and its own noise
    assert report.bound == pytest.approx(measured.bits_per_dim, rel=0.25)
    assert report.standard_error_over_data == pytest.approx(measured.standard_error_over_images, rel=0.2)


def test_a_model_that_may_be_told_nothing_is_told_nothing() -> None:
    data = levels(6)
    whole, report = encode(told(), data, transitions=T)
    found = decode(told(), whole)
    assert torch.equal(found.levels, data) and found.labels is None and report.labels == 0 and report.notes
    with pytest.raises(ConfigurationError, match="dropout"):
        encode(told(dropout=0), data, transitions=T)
    for wrong in (LABELS, torch.full((6,), 3), torch.ones(6)):
        with pytest.raises(ConfigurationError):
            encode(told(), data, wrong, transitions=T)
    with pytest.raises(ConfigurationError, match="labels"):
        encode(made("linear"), data, LABELS[:6], transitions=T)


def test_what_is_known_on_the_way_is_told_the_class_too() -> None:
    whole = encode(told(), levels(), LABELS, transitions=T)[0]
    assert progress_of(told(), whole, columns=3).error[-1] == 0


def test_blocks_decode_by_themselves() -> None:
    pipe, data = made("linear"), levels(12)
    whole, _ = encode(pipe, data, transitions=T, block=5)
    container = Container.from_bytes(whole)
    assert [block.count for block in container.blocks] == [5, 5, 2]
    assert torch.equal(decode(pipe, whole).levels, data)
