"""The bound as an objective: named terms, finite and infinite T, float32 islands, fakes it knows nothing of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import registered
from exact_denoisers import CorrelatedGaussianDenoiser, ExactDenoiser, Mixture, PerPixelSchedule
from naming import naming
from plugin_of_law_7 import HoldingProcess
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule, NoiseSchedule
from vdm_hub.diffusion.times import stratified_times
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.objectives.variational_bound import Bound, Terms, VDMObjective

SHAPE = (3, 4, 4)
DATA = Mixture.gaussian(0.3)
every_transitions = pytest.mark.parametrize("transitions", [None, 1, 5])


def batch_of(count: int, num_levels: int = 256) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"levels": torch.randint(0, num_levels, (count, *SHAPE), generator=generator, dtype=torch.uint8)}


def evaluate(objective: VDMObjective, count: int = 8, **arguments: Tensor) -> Bound:
    batch = batch_of(count) | arguments
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(1))
    bound = objective(batch, stratified_times(count, 0.3), noise)
    assert isinstance(bound, Bound)
    return bound


def test_the_total_is_the_sum_of_the_terms_in_nats_and_the_loss_its_mean_in_bits_per_dimension() -> None:
    bound = Bound({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.5, 0.5])}, dimensions=4)
    assert bound.total.tolist() == [1.5, 3.5]
    assert float(bound.loss) == pytest.approx(2.5 / (4 * math.log(2)))
    per_term = sum(bound.bits_per_dim().values())
    assert isinstance(per_term, Tensor)
    torch.testing.assert_close(per_term.mean(), bound.loss)


@pytest.mark.parametrize("decoder", registered.names("decoders"))
@pytest.mark.parametrize("target", registered.names("parameterizations"))
@every_transitions
def test_terms_are_per_datum_finite_and_independent_of_the_rest_of_the_batch(
    transitions: int | None, target: str, decoder: str
) -> None:
    process = registered.process(LinearSchedule(), target, decoder=decoder)
    objective = VDMObjective(ExactDenoiser(DATA, process), process, transitions)
    batch = batch_of(8)
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(1))
    times = stratified_times(8, 0.3)
    whole = objective(batch, times, noise)
    assert list(whole.terms) == ["reconstruction", "prior", "diffusion"] and whole.dimensions == math.prod(SHAPE)
    part = objective({"levels": batch["levels"][2:5]}, times[2:5], {name: value[2:5] for name, value in noise.items()})
    for name, term in whole.terms.items():
        assert term.shape == (8,) and term.dtype == torch.float32
        assert bool(torch.isfinite(term).all()) and float(term.detach().min()) >= 0
        torch.testing.assert_close(part.terms[name], term[2:5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transitions", [1, 3, 7])
def test_finite_t_is_unbiased_for_the_sum_over_transitions(transitions: int) -> None:
    """One datum and one eps at one time in each transition: the mean is the sum of all transition KLs."""
    process = registered.process(LinearSchedule())
    objective = VDMObjective(ExactDenoiser(DATA, process), process, transitions)
    batch = {"levels": batch_of(1)["levels"].expand(transitions, *SHAPE)}
    noise = {
        name: value.expand(transitions, *SHAPE)
        for name, value in objective.draw_noise(batch_of(1), torch.Generator().manual_seed(1)).items()
    }
    mean = objective(batch, stratified_times(transitions, 0.01 / transitions), noise).terms["diffusion"].mean()
    x = process.encode(batch["levels"])
    t = torch.arange(1, transitions + 1) / transitions
    network = ExactDenoiser(DATA, process).bare
    kl = process.bind(x, noise)[1].transition_kl(x, t - 1 / transitions, t, noise, network)
    torch.testing.assert_close(mean, kl.sum(), rtol=1e-4, atol=0)


def test_many_transitions_estimate_the_continuous_bound() -> None:
    process = registered.process(LinearSchedule())
    network = ExactDenoiser(DATA, process)
    continuous, finite = (
        evaluate(VDMObjective(network, process, transitions), 64).terms["diffusion"].mean()
        for transitions in (None, 2000)
    )
    assert float(finite) == pytest.approx(float(continuous), rel=2e-2)


@pytest.mark.parametrize("transitions", [0, -1])
def test_no_transitions_are_refused(transitions: int) -> None:
    process = registered.process(LinearSchedule())
    with pytest.raises(ConfigurationError, match=naming("transitions", transitions)):
        VDMObjective(nn.Identity(), process, transitions)


class LinearLayerSchedule(NoiseSchedule):
    """Linear log-SNR through a matrix product, which autocast would round to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([[18.3]]))
        self.register_buffer("bias", torch.tensor([-13.3]))

    def forward(self, t: Tensor) -> Tensor:
        return F.linear(t[..., None], self.weight.to(t.dtype), self.bias.to(t.dtype))[..., 0]  # type: ignore[operator]

    def to_config(self) -> dict[str, Any]:
        return {}


def every_way(objective: VDMObjective, count: int = 8) -> list[Terms]:
    """The terms as `forward` has them, as the network has a say in them, and by dimension in continuous time."""
    batch, times = batch_of(count), stratified_times(count, 0.3)
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(1))
    ways = [evaluate(objective, count).terms]
    ways += [objective.network_terms(batch, times, noise, reconstruction=asks) for asks in (True, False)]
    return ways if objective.transitions else [*ways, objective.terms_by_dimension(batch, times, noise)]


@every_transitions
def test_under_autocast_the_bound_with_an_exact_denoiser_is_that_of_float32(transitions: int | None) -> None:
    process = registered.process(LinearLayerSchedule())
    objective = VDMObjective(ExactDenoiser(DATA, process), process, transitions)
    plain = registered.process(LinearSchedule(-13.3, 5.0))
    expected, by_hand = every_way(objective), every_way(VDMObjective(ExactDenoiser(DATA, plain), plain, transitions))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert process.schedule(torch.tensor([0.3])).dtype == torch.bfloat16, "autocast must be able to spoil gamma"
        actual = every_way(objective)
    for one, low, hand in zip(expected, actual, by_hand, strict=True):
        for name, term in one.items():
            assert torch.equal(low[name], term)
            torch.testing.assert_close(hand[name], term, rtol=1e-4, atol=1e-5)


def test_a_reconstruction_is_among_the_network_s_terms_where_it_is_asked_for() -> None:
    process = registered.process(LinearSchedule())
    whole, with_it, without, *_ = every_way(VDMObjective(ExactDenoiser(DATA, process), process))
    assert with_it.keys() == {"reconstruction", "diffusion"} and without.keys() == {"diffusion"}
    for name, term in with_it.items():
        assert torch.equal(term, whole[name])


class Body(nn.Module):
    """A network that remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.calls: list[dict[str, Any]] = []

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **others: Tensor) -> tuple[Tensor]:
        output = self.layer(sample)
        self.calls.append({"sample": sample, "timestep": timestep, "output": output, "others": others})
        assert not return_dict
        return (output,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_only_the_body_of_the_network_runs_in_the_precision_around_it(dtype: torch.dtype) -> None:
    process, body = registered.process(LinearSchedule()), Body()
    low = dtype if dtype != torch.float32 else torch.bfloat16
    with torch.autocast("cpu", dtype=low, enabled=dtype == low):
        bound = evaluate(VDMObjective(body, process))
    (call,) = body.calls
    assert call["output"].dtype == dtype
    assert call["sample"].dtype == call["timestep"].dtype == bound.loss.dtype == torch.float32


def test_everything_but_the_levels_reaches_the_network_by_name() -> None:
    process, body = registered.process(LinearSchedule()), Body()
    labels = torch.arange(8)
    evaluate(VDMObjective(body, process), class_labels=labels, indices=labels)
    assert body.calls[0]["others"].keys() == {"class_labels"}
    assert torch.equal(body.calls[0]["others"]["class_labels"], labels)
    assert body.calls[0]["timestep"].shape == (8,)


@pytest.mark.parametrize("name", registered.names("noise_schedules"))
@every_transitions
def test_gradients_reach_network_and_schedule_through_the_objective(name: str, transitions: int | None) -> None:
    schedule = registered.scalar_schedule(name)
    process, body = registered.process(schedule), Body()
    evaluate(VDMObjective(body, process, transitions)).loss.backward()
    # One transition sees only the endpoints: no gradient can reach the shape.
    unseen = schedule.variance_parameters() if transitions == 1 else set()
    for parameter_name, parameter in (*body.named_parameters(), *schedule.named_parameters()):
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        assert parameter_name in unseen or float(parameter.grad.abs().max()) > 0


@every_transitions
def test_law_7_a_gamma_per_pixel_and_an_extra_term_run_through_the_objective(transitions: int | None) -> None:
    pixels = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    schedule = PerPixelSchedule(-10.0, 5.0, tilt=pixels, bump=0.5 * pixels.flip(-1), extra=2.5)
    process: GaussianProcess = registered.process(schedule, "v_prediction", AffineConditioning(-10.0, 5.0))
    covariance = 0.3 * torch.eye(math.prod(SHAPE), dtype=torch.float64)
    bound = evaluate(VDMObjective(CorrelatedGaussianDenoiser(covariance, process), process, transitions))
    assert bound.terms["auxiliary"].tolist() == [2.5] * 8
    assert all(term.shape == (8,) and bool(torch.isfinite(term).all()) for term in bound.terms.values())
    torch.testing.assert_close(bound.total, sum(bound.terms.values(), torch.zeros(8)))


def test_law_7_a_flat_gamma_per_pixel_is_the_scalar_schedule() -> None:
    flat = PerPixelSchedule(-13.3, 5.0, tilt=torch.zeros(SHAPE), bump=torch.zeros(SHAPE))
    conditioning = AffineConditioning(-13.3, 5.0)
    bounds = []
    for schedule in (flat, LinearSchedule()):
        process = registered.process(schedule, conditioning=conditioning)
        bounds.append(evaluate(VDMObjective(ExactDenoiser(DATA, process), process)))
    for name in ("reconstruction", "prior", "diffusion"):
        torch.testing.assert_close(bounds[0].terms[name], bounds[1].terms[name], rtol=1e-5, atol=1e-5)


def test_levels_beyond_the_process_and_times_beyond_the_chain_are_refused() -> None:
    objective = VDMObjective(torch.nn.Identity(), registered.process(LinearSchedule()))
    levels = torch.zeros((2, 1, 2, 2), dtype=torch.int64)
    noise = objective.draw_noise({"levels": levels}, torch.Generator().manual_seed(0))
    ways: list[Callable[[dict[str, Tensor], Tensor], object]] = [
        lambda batch, times: objective(batch, times, noise),
        lambda batch, times: objective.network_terms(batch, times, noise, reconstruction=False),
        lambda batch, times: objective.terms_by_dimension(batch, times, noise),
    ]
    for way in ways:
        for wrong in (-1, objective.process.num_levels):
            levels[1, 0, 0, 0] = wrong  # one entry of all
            with pytest.raises(DataError, match=str(wrong)):
                way({"levels": levels}, torch.rand(2))
        with pytest.raises(DataError, match="times"):
            way({"levels": levels * 0}, torch.tensor([0.5, 1.5]))


def test_the_parts_are_all_modules_of_the_objective_by_what_they_are() -> None:
    process, body = registered.process(registered.scalar_schedule("learned_monotone")), Body()
    assert VDMObjective(body, process).parts == {"network": body, "schedule": process}


def held(given: Tensor | None, transitions: int = 3) -> tuple[Bound, Body]:
    """The bound of bits of which a part is given, and the network that was asked."""
    torch.manual_seed(0)  # one network for all
    body = Body()
    objective = VDMObjective(body, HoldingProcess(), transitions)
    batch = {"levels": batch_of(4, 2)["levels"]} | ({} if given is None else {"given": given})
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(1))
    bound = objective(batch, stratified_times(4, 0.3), noise)
    again = objective.network_terms(batch, stratified_times(4, 0.3), noise, reconstruction=True)
    for name, term in again.items():
        assert torch.equal(term, bound.terms[name])
    return bound, body


def test_what_is_given_is_in_no_term_and_the_rest_is_what_it_would_be() -> None:
    none = torch.zeros(4, *SHAPE, dtype=torch.bool)
    (free, _), (also, _), (all_given, body) = held(None), held(none), held(~none)
    for name, term in free.terms.items():
        assert torch.equal(also.terms[name], term)
        assert float(all_given.terms[name].detach().abs().max()) < 1e-6
        assert name == "prior" or float(term.detach().min()) > 1e-3  # of all coin tosses
    assert body.calls[0]["others"] == {}  # the network is not told
    one, _ = held(torch.tensor([True, False, False, False]).reshape(4, 1, 1, 1).expand(4, *SHAPE))
    assert torch.equal(one.total[1:], free.total[1:]) and float(one.total.detach()[0]) < 1e-5 < float(free.total[0])


def test_a_process_of_whole_data_takes_nothing_given_and_marks_are_bools_of_the_levels_shape() -> None:
    objective = VDMObjective(Body(), registered.process(LinearSchedule()))
    with pytest.raises(ConfigurationError, match=naming("GaussianProcess", "'given'")):
        evaluate(objective, given=torch.ones(8, *SHAPE, dtype=torch.bool))
    for wrong in (torch.ones(8, dtype=torch.bool), torch.ones(8, *SHAPE)):
        with pytest.raises(DataError, match=naming("'given'", str(wrong.dtype))):
            evaluate(objective, given=wrong)
