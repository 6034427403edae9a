"""A Gaussian process's terms against its own reverse step, and each term and field by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import registered
from ddpm_variances import by_betas
from exact_denoisers import PerPixelSchedule
from plugin_of_law_7 import ResamplingProcess
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.gaussian_process import BoundGaussian, GaussianProcess, scalar_gaussian
from vdm_hub.diffusion.learned_schedules import LearnedLinearSchedule
from vdm_hub.diffusion.noise_schedules import BoundGamma, CosineSchedule, Gamma, LinearSchedule, NoiseSchedule
from vdm_hub.diffusion.parameterizations import Epsilon
from vdm_hub.diffusion.reverse_variances import REVERSE_VARIANCES, reverse_variance
from vdm_hub.errors import ConfigurationError

SAID = torch.tensor(0.4, dtype=torch.float64)
every_variance = pytest.mark.parametrize("name", sorted(REVERSE_VARIANCES))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def network_of(process: GaussianProcess) -> Callable[..., Tensor]:
    """No denoiser of anything; where the variance is learned it says the same of all."""

    def network(sample: Tensor, timestep: Tensor) -> Tensor:
        mean = torch.sin(3 * sample) + timestep[:, None, None, None] / 1000
        return torch.cat([mean, SAID.expand_as(mean)], 1) if process.variance.learned else mean

    return network


def process_of(name: str, **arguments: Any) -> GaussianProcess:
    process = registered.process(LinearSchedule(-6.0, 4.0), "v_prediction", **arguments)
    process.variance = reverse_variance(name)
    return process


@every_variance
@pytest.mark.parametrize("clipping", [None, lambda x: x.clamp(-0.3, 0.3)])
def test_a_transition_s_kl_is_that_of_the_posterior_to_what_the_reverse_step_draws(name: str, clipping: Any) -> None:
    process = process_of(name)
    process.clipping, network = clipping, network_of(process)
    x, eps = draw(2, 3, 2, 4, 4)
    s, t = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.7, 0.55]], dtype=torch.float64)
    _, bound = process.bind(x, {})
    gamma_s, gamma_t = ((-6 + 10 * time)[:, None, None, None] for time in (s, t))
    z = gaussian.marginal_sample(x, gamma_t, eps)
    torch.testing.assert_close(bound.sample(x, t, {"marginal": eps}), z)
    drawn, x_hat = bound.reverse_step(bound.predict(network, z, t), z, s, t, seeded(5))
    v_q, v_p = (by_betas(each, SAID, gamma_s, gamma_t) for each in ("fixed_small", name))
    weight_z, weight_x, _ = gaussian.posterior(gamma_s, gamma_t)
    mean_p = drawn - v_p.sqrt() * normal_noise(z.shape, seeded(5), z.device, z.dtype)
    expected = gaussian.kl_divergence(weight_z * z + weight_x * x, v_q, mean_p, v_p).flatten(1).sum(1)
    found = bound.transition_kl(x, s, t, {"marginal": eps}, network)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    assert (float(x_hat.abs().max()) == pytest.approx(0.3)) == (clipping is not None)
    eps_hat, _ = bound.predict_noise(network, z, gamma_t.flatten())
    torch.testing.assert_close(gaussian.alpha(gamma_t) * x_hat + gaussian.sigma(gamma_t) * eps_hat, z)
    if clipping is None:
        torch.testing.assert_close(bound.score(network, z, t), -eps_hat / gaussian.sigma(gamma_t))
    if name != "learned":  # the KL of short steps, over their length; of the variances, it vanishes
        rate = bound.kl_rate(x, t, {"marginal": eps}, network)
        error = ((eps - eps_hat) ** 2).flatten(1).sum(1)
        torch.testing.assert_close(rate, 0.5 * 10 * error, rtol=1e-9, atol=0)
    else:
        with pytest.raises(ConfigurationError, match="continuous"):
            bound.kl_rate(x, t, {"marginal": eps}, network)


@every_variance
@pytest.mark.parametrize("decoder", registered.names("decoders"))
def test_the_terms_at_the_ends_are_those_of_the_latents_there(name: str, decoder: str) -> None:
    process = process_of(name, decoder=decoder, num_levels=8)
    network, levels = network_of(process), torch.randint(0, 8, (3, 2, 4, 4), generator=seeded(2))
    x, eps, gamma_0 = process.scaling.encode(levels, torch.float64), draw(3, 2, 4, 4), torch.tensor(-6.0).double()
    _, bound = process.bind(x, {})
    torch.testing.assert_close(bound.prior_kl(x), gaussian.prior_kl(x, torch.tensor(4.0).double()))

    z_0 = gaussian.marginal_sample(x, gamma_0, eps)
    v = network(z_0, torch.zeros(3))[:, :2]
    x_hat = gaussian.alpha(gamma_0) * z_0 - gaussian.sigma(gamma_0) * v
    variance = by_betas("fixed_small", gamma_0, gamma_0, gamma_0 + 10 / 999)
    if process.variance.learned:
        variance = process.variance.log_first(SAID, variance, gamma_0).exp()
    expected = process.decoder.negative_log_likelihood(levels, z_0, gamma_0, variance, lambda: x_hat, process.scaling)
    asked: list[Tensor] = []

    def counted(sample: Tensor, timestep: Tensor) -> Tensor:
        asked.append(sample)
        return network(sample, timestep)

    found = bound.reconstruction(levels, x, {"reconstruction": eps}, counted)
    assert len(asked) == (decoder == "ddpm" or process.variance.learned)  # only where it is needed, and once
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    decoded = process.decoder.sample(z_0, gamma_0, lambda: x_hat, process.scaling, seeded(1))
    assert torch.equal(bound.decode(z_0, network, seeded(1)), decoded)


def test_a_prediction_of_the_noise_is_taken_as_it_is_however_little_noise_there_is() -> None:
    """Exactly: by way of the data it would be rounded, and at the first latent nothing would be left of it."""
    process = registered.process(LinearSchedule(-30.0, 4.0))
    (x, eps), zero = draw(2, 1, 2, 4, 4), torch.zeros(1, dtype=torch.float64)  # a batch of one
    bound, noise = process.bind(x, {})[1], {"marginal": eps}
    assert torch.equal(bound.predict_noise(lambda *_: eps, x, zero - 30)[0], eps)
    assert torch.equal(bound.transition_kl(x, zero, zero + 0.75, noise, lambda *_: eps), zero)
    assert torch.equal(bound.kl_rate(x, zero + 0.75, noise, lambda *_: eps), zero)


class Scaled(Epsilon):
    def input_scale(self, gamma: Tensor) -> Tensor:
        return 2 * torch.ones_like(gamma)

    def output_scale(self, gamma: Tensor) -> Tensor:
        return 3 * torch.ones_like(gamma)


@pytest.mark.parametrize("name", ["fixed_small", "learned"])
def test_a_target_scales_the_network_s_input_and_its_mean_alone(name: str) -> None:
    process = registered.process(LinearSchedule(-6.0, 4.0), Scaled())
    process.variance = reverse_variance(name)
    z, t = draw(2, 3, 4, 4), torch.full((2,), 0.5, dtype=torch.float64)
    said = process.bind(None, {})[1].predict(network_of(process), z, t)
    mean = 3 * (torch.sin(6 * z) + 0.4995)
    torch.testing.assert_close(said[:, :3], mean)
    assert torch.equal(said[:, 3:], SAID.expand_as(z) if name == "learned" else z[:, 3:])


def test_a_gamma_per_pixel_is_told_by_its_mean_and_weighs_each_pixel() -> None:
    schedule = PerPixelSchedule(-8.0, 4.0, tilt=torch.tensor([1.0, -1.0]), bump=torch.tensor([1.5, -1.5]))
    process = registered.process(schedule, conditioning=AffineConditioning(-8.0, 4.0))
    x, eps, told = draw(3, 2), draw(3, 2, seed=1), []
    s, t = (torch.full((3,), time, dtype=torch.float64) for time in (0.3, 0.5))

    def network(sample: Tensor, timestep: Tensor) -> Tensor:
        told.append(timestep)
        return 0.5 * sample

    bound = process.bind(x, {})[1]
    gamma_s, gamma_t = schedule(s), schedule(t)
    z = gaussian.marginal_sample(x, gamma_t, eps)
    expected = 0.5 * (torch.expm1(gamma_t - gamma_s) * (eps - 0.5 * z) ** 2).sum(1)
    torch.testing.assert_close(bound.transition_kl(x, s, t, {"marginal": eps}, network), expected)
    torch.testing.assert_close(told[0], torch.full((3,), 999 * 0.5, dtype=torch.float64))
    for_all = bound.reverse_step(0.5 * z, z, s[0], t[0], seeded(0))  # one time for all, as samplers give it
    for one, other in zip(for_all, bound.reverse_step(0.5 * z, z, s, t, seeded(0)), strict=True):
        torch.testing.assert_close(one, other)
    # Its mean's gamma may rise unevenly or depend on the datum, so samplers' timesteps are even in time.
    times = torch.linspace(0, 1, 5)
    timesteps = process.timestep(times)
    assert timesteps.dtype == torch.float64 and timesteps.tolist() == [0, 249.75, 499.5, 749.25, 999]
    assert torch.equal(process.time(timesteps), times.double())


def test_the_network_is_told_the_context_of_gamma() -> None:
    context = torch.ones(3, 5)
    bound = BoundGaussian(registered.process(LinearSchedule()), BoundGamma(LinearSchedule(), context))

    def network(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return sample + context.sum()

    assert torch.equal(bound.predict(network, torch.zeros(3, 2), torch.full((3,), 0.5)), torch.full((3, 2), 15.0))


def test_samplers_timesteps_are_what_the_network_is_told_of_a_gamma_of_time_alone() -> None:
    process = registered.process(schedule := CosineSchedule(-9.0, 3.0), conditioning=AffineConditioning(-10.0, 5.0))
    times = torch.linspace(0, 1, 5)
    timesteps = process.timestep(times)
    torch.testing.assert_close(timesteps, 999 * (schedule(times.double()) + 10) / 15)
    torch.testing.assert_close(process.time(timesteps), times.double())


class Wide(LearnedLinearSchedule):
    scalar = False

    def draw_noise(self, batch_size: int, generator: Generator, device: torch.device) -> dict[str, Tensor]:
        return {"wide": normal_noise((batch_size,), generator, device)}


def test_what_a_schedule_draws_is_one_a_datum() -> None:
    process = registered.process(Wide(), conditioning=AffineConditioning())
    drawn = process.draw_noise((3, 2), seeded(0), torch.device("cpu"))
    assert {name: tuple(each.shape) for name, each in drawn.items()} == {
        "marginal": (3, 2),
        "reconstruction": (3, 2),
        "wide": (3,),
    }


class WithItsOwnBind(LinearSchedule):
    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        return super().bind(x, noise)


class Another(GaussianProcess):
    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], BoundGaussian]:
        return super().bind(x, noise)


def test_the_expectation_by_level_is_that_of_one_gamma_that_t_alone_decides() -> None:
    def found(schedule: NoiseSchedule, cls: type[GaussianProcess] = GaussianProcess) -> Tensor | None:
        plain = registered.process(schedule, conditioning=AffineConditioning(), num_levels=8)
        parts = plain.parameterization, plain.conditioning, plain.decoder, plain.scaling
        return cls(schedule, *parts).reconstruction_by_level()

    plain = registered.process(LinearSchedule(-6.0, 4.0), num_levels=8)
    expected = plain.decoder.expected_by_level(-6.0, plain.scaling)
    assert expected is not None
    torch.testing.assert_close(found(LinearSchedule(-6.0, 4.0)), expected)
    assert found(Wide()) is found(WithItsOwnBind()) is found(LinearSchedule(), Another) is None


def test_a_process_comes_from_its_fields() -> None:
    default = GaussianProcess.from_fields({})
    assert (default.num_levels, default.num_train_timesteps, default.scaling.name) == (256, 1000, "bin_centers")
    assert default.conditioning.to_config() == AffineConditioning().to_config()
    schedule = {"name": "learned_linear", "config": {"gamma_min": -6.0, "gamma_max": 4.0}}
    fields = {"noise_schedule": schedule, "num_train_timesteps": 50, "num_levels": 8}
    process = GaussianProcess.from_fields(fields)
    assert process.conditioning.to_config() == AffineConditioning(-6.0, 4.0, 50).to_config()
    told = {"name": "affine", "config": {"gamma_min": -9.0, "gamma_max": 3.0}}
    process = GaussianProcess.from_fields(fields | {"conditioning": told})
    assert process.conditioning.to_config() == AffineConditioning(-9.0, 3.0, 50).to_config()
    again = GaussianProcess.from_fields(process.fields())
    assert again.fields() == process.fields()
    given = LinearSchedule()
    assert GaussianProcess.from_fields(fields, given).schedule is given
    betas = [0.1, 0.2, 0.3]
    table = GaussianProcess.from_fields({"noise_schedule": "discrete_betas", "trained_betas": betas})
    assert table.schedule.to_config() == {"betas": betas}
    assert table.variance.is_posterior
    # Its constants stay where they are when the schedule moves, also where they are the defaults.
    process = GaussianProcess.from_fields({"noise_schedule": "learned_linear"})
    with torch.no_grad():
        next(process.schedule.parameters()).add_(1)
    assert GaussianProcess.from_fields(process.fields()).conditioning.to_config() == AffineConditioning().to_config()


def test_a_schedule_that_no_table_can_hold_is_carried() -> None:
    process = registered.process(wide := Wide(), conditioning=AffineConditioning())
    assert process.carried_schedule() is wide
    assert registered.process(LearnedLinearSchedule()).carried_schedule() is None


def test_a_half_that_is_not_read_changes_nothing_and_is_read_unless_said() -> None:
    """Of a network with twice the channels, as DiT's has, and a variance that is not learned."""
    plain, halved = process_of("fixed_small"), process_of("fixed_small")
    halved.unread_half = True
    network, z, t = network_of(plain), draw(2, 3, 4, 5, seed=1), torch.tensor([0.3, 0.8], dtype=torch.float64)

    def with_more(sample: Tensor, timestep: Tensor) -> Tensor:
        mean = network(sample, timestep)
        return torch.cat([mean, mean + 7], 1)

    expected = plain.bind(draw(2, 3, 4, 5), {})[1].predict(network, z, t)
    assert torch.equal(halved.bind(draw(2, 3, 4, 5), {})[1].predict(with_more, z, t), expected)
    assert plain.split(torch.cat([z, z], 1), z)[0].shape[1] == 6


def test_terms_by_dimension_have_the_reconstruction_of_each_level_and_no_learned_variance() -> None:
    levels, t = torch.randint(0, 256, (2, 3, 4, 5), generator=seeded(0)), torch.tensor([0.3, 0.8], dtype=torch.float64)
    for name in ("fixed_small", "learned"):
        process = process_of(name, decoder="factorised")
        x, known = process.encode(levels, torch.float64), process.reconstruction_by_level()
        noise = {part: draw(2, 3, 4, 5, seed=seed) for seed, part in enumerate(("marginal", "reconstruction"))}
        bound = process.bind(x, noise)[1]
        if name == "learned":
            with pytest.raises(ConfigurationError, match="continuous"):
                bound.terms_by_dimension(levels, x, t, noise, network_of(process))
            continue
        terms = bound.terms_by_dimension(levels, x, t, noise, network_of(process))
        assert known is not None and float(known.std()) > 0.01
        assert torch.equal(terms["reconstruction"], known[levels])


def test_one_gamma_a_time_is_asked_for_where_it_is_needed() -> None:
    per_pixel = PerPixelSchedule(-8.0, 4.0, tilt=torch.zeros(1, 4, 4), bump=torch.zeros(1, 4, 4))
    with pytest.raises(ConfigurationError, match="PerPixelSchedule"):
        scalar_gaussian(registered.process(per_pixel))
    with pytest.raises(ConfigurationError, match="ResamplingProcess"):
        scalar_gaussian(ResamplingProcess())
    plain = process_of("fixed_small")
    assert scalar_gaussian(plain) is plain


def test_whose_kernels_are_gaussian_says_so() -> None:
    """Importance weights and the laws of kernels ask for it."""
    assert GaussianProcess.has_gaussian_kernels
