"""MuLAN: the laws, its two oracles, the exact KL of its latent, and the way from training to a published pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from naming import naming
from plugin_runs import check_the_whole_way, errors_without_plugins, train_a_little
from tiny import tiny_unet
from vdm_hub import (
    AffineConditioning,
    Check,
    ConfigurationError,
    DataScaling,
    Epsilon,
    FactorisedDecoder,
    GaussianProcess,
    LinearSchedule,
    NoiseSchedule,
    VDMPipeline,
    VDMScheduler,
    alpha,
    parametrize_with_checks,
    sigma,
)
from vdm_hub_mulan import MulanLatentSchedule, MulanSchedule
from vdm_hub_mulan.schedules import polynomial

PACKAGE, ENDS = "vdm-hub-mulan", {"gamma_min": -7.65, "gamma_max": 5.5}
SHAPE = (1, 2, 2)


@parametrize_with_checks(
    [
        MulanSchedule([1, 8, 8]),
        MulanSchedule([1, 8, 8], -8.0, 4.0, learn_endpoints=False),
        MulanLatentSchedule([1, 8, 8], latent_size=3, hidden_size=16),
    ]
)
def test_conformance(check: Check) -> None:
    check()


def process_of(schedule: NoiseSchedule) -> GaussianProcess:
    scaling, conditioning = DataScaling("bin_centers", 17), AffineConditioning(**ENDS)
    return GaussianProcess(schedule, Epsilon(), conditioning, FactorisedDecoder(), scaling).double()


def moved(schedule: MulanSchedule, *names: str) -> MulanSchedule:
    """With other coefficients, as training leaves them; only of the parameters whose names begin so."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in schedule.named_parameters():
        if name.startswith(names):
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return schedule


# ---- the two oracles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MulanSchedule, MulanLatentSchedule])
@pytest.mark.parametrize("constant", [1.0, -0.3, 20.0])
def test_equal_constant_coefficients_and_no_kl_are_the_linear_schedule(
    cls: type[MulanSchedule], constant: float
) -> None:
    schedule = cls([1, 8, 8], **ENDS)
    constants = schedule.coefficients if cls is MulanSchedule else schedule.decoder[-1].bias
    constants.data.reshape(-1, 3)[:, 2] = constant
    levels = torch.randint(0, 17, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    s, t = torch.tensor([0.0, 0.3, 0.5, 0.8]), torch.tensor([0.1, 0.4, 0.6, 1.0])
    s, t = s.double(), t.double()
    network = lambda sample, timestep, **context: torch.tanh(sample) + timestep.reshape(-1, 1, 1, 1) / 999  # noqa: E731
    found = []
    for process in (process_of(LinearSchedule(**ENDS)), process_of(schedule)):
        x = process.encode(levels).double()
        noise = {
            name: value.double()
            for name, value in process.draw_noise(tuple(x.shape), torch.Generator().manual_seed(1), x.device).items()
        }
        extras, bound = process.bind(x, noise)
        terms = [bound.prior_kl(x), bound.reconstruction(levels, x, noise, network)]
        terms += [bound.transition_kl(x, s, t, noise, network), bound.kl_rate(x, t, noise, network)]
        assert not any(bool(term.any()) for term in extras.values())
        found.append(torch.stack(terms).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", [MulanSchedule, MulanLatentSchedule])
def test_a_correlated_gaussian_has_the_closed_form_bound_of_its_two_ends(cls: type[MulanSchedule]) -> None:
    """``1/2 ln det(I + S L_0)/det(I + S L_1)``, L = diag(exp(-gamma)), for a gamma per pixel and the exact denoiser.

    The squared error is quadratic in the standard normals behind x and eps, so its mean is the sum over unit vectors.
    """
    process = process_of(moved(cls(SHAPE, **ENDS), "coefficients", "decoder.2", "gamma"))
    process.schedule.double()
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    covariance, units = root @ root.T, torch.eye(8, dtype=torch.float64)
    x, eps = (units[:, :4] @ root.T).reshape(8, *SHAPE), units[:, 4:].reshape(8, *SHAPE)
    latent = process.draw_noise((1, *SHAPE), torch.Generator().manual_seed(4), x.device)
    noise = {name: value.double().expand(8, *value.shape[1:]) for name, value in latent.items()} | {"marginal": eps}
    bound = process.bind(x, noise)[1]  # the latent's encoder is at its start: c does not depend on x
    nodes, weights = np.polynomial.legendre.leggauss(200)
    total = 0.0
    with torch.no_grad():
        gammas = [bound.gamma(torch.full((8,), t, dtype=torch.float64))[0].flatten() for t in (0.0, 1.0)]
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            t = torch.full((8,), node, dtype=torch.float64)
            gamma = bound.gamma(t)[0].flatten()
            a, b = alpha(gamma), sigma(gamma)
            gain = covariance * a @ torch.linalg.inv(a[:, None] * covariance * a + torch.diag(b**2))

            def exact(
                z: Tensor,
                timestep: Tensor,
                context: Tensor | None = None,
                a: Tensor = a,
                b: Tensor = b,
                gain: Tensor = gain,
            ) -> Tensor:
                flat = z.flatten(1)
                return ((flat - a * (flat @ gain.T)) / b).reshape(z.shape)

            total += weight * float(bound.kl_rate(x, t, noise, exact).sum())
    ends = [torch.logdet(torch.eye(4) + covariance * torch.exp(-gamma)) for gamma in gammas]
    spread = bound.gamma(torch.full((8,), 0.5, dtype=torch.float64))[0]
    assert float(spread.detach().std()) > 0.1  # pixels differ, indeed
    assert total == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-6)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_a_denoiser_that_is_told_which_pixel_is_noised_first_reaches_the_exact_bound(strength: float) -> None:
    """Two independent N(0, 1) pixels: 7.998 nats, ``1/2 ln((1 + e^8)/(1 + e^-6))`` each; more for one told the mean.

    The best denoiser that is told the mean gamma alone weighs both paths by how likely they make z. Squared errors
    are integrated by Gauss-Hermite over x and eps of both pixels, and by Gauss-Legendre over t.
    """
    schedule = MulanLatentSchedule([1, 1, 2], -8.0, 6.0, latent_size=1, hidden_size=2).double()
    hidden, coefficients = schedule.decoder[0], schedule.decoder[2]
    hidden.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    hidden.bias.data.zero_()
    coefficients.weight.data[1, 0] = coefficients.weight.data[4, 1] = (
        strength  # b of one pixel if c > 0, else the other's
    )
    process = process_of(schedule)
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(8))
    x0, x1, e0, e1 = torch.cartesian_prod(nodes, nodes, nodes, nodes).unbind(1)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * 4).prod(1)
    x, eps = (torch.stack(pair, 1).reshape(-1, 1, 1, 2) for pair in ((x0, x1), (e0, e1)))
    drawn = [torch.full((len(x), 1), c, dtype=torch.float64) for c in (4.0, -4.0)]
    paths = [process.bind(None, {"latent": c})[1] for c in drawn]

    def told(z: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        mine = now[0] if float(context[0]) > 0 else now[1]
        return sigma(mine) * z

    def mean_only(z: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        # x and eps are N(0, 1), so z is, too, along either path: z says nothing of which it is.
        return sum(sigma(gamma) for gamma in now) / 2 * z

    totals = dict.fromkeys((told, mean_only), 0.0)
    times, shares = np.polynomial.legendre.leggauss(60)
    with torch.no_grad():
        for time, share in zip((times + 1) / 2, shares / 2, strict=True):
            t = torch.full((len(x),), time, dtype=torch.float64)
            now = [path.gamma(t) for path in paths]
            for network in totals:
                for path in paths:  # each path half of the time
                    rate = path.kl_rate(x, t, {"marginal": eps}, network)
                    totals[network] += 0.5 * share * float((mass * rate).sum())
    assert totals[told] == pytest.approx(math.log((1 + math.exp(8)) / (1 + math.exp(-6))), rel=1e-6)
    assert totals[told] == pytest.approx(7.998, abs=1e-3)
    assert totals[mean_only] > totals[told] + 0.02 * strength


# ---- the formulas ---------------------------------------------------------------------------------------------------


def test_the_polynomial_is_the_integral_of_a_square() -> None:
    coefficients = torch.randn(5, 1, 1, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, d = coefficients.reshape(5, 3).unbind(-1)
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    square = (a[:, None] * u**2 + b[:, None] * u + d[:, None]) ** 2
    integral = torch.cat([torch.zeros(5, 1), torch.cumulative_trapezoid(square, u)], 1)
    for index in (0, 4_000, 12_345, 20_000):
        expected = 0.99 * integral[:, index] / integral[:, -1] + 0.01 * u[index]
        for size in (1e-30, 1e-6, 1.0, 1e20):  # a share is the same at every size of the coefficients
            actual = polynomial(u[index].expand(5, 1, 1, 1), size * coefficients).flatten()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_of_zero_are_the_linear_schedule(dtype: torch.dtype) -> None:
    coefficients = torch.zeros(1, 1, 1, 1, 3, dtype=dtype, requires_grad=True)
    t = torch.linspace(0, 1, 9, dtype=dtype).reshape(9, 1, 1, 1)
    share = polynomial(t, coefficients)
    torch.testing.assert_close(share.detach(), t)
    (gradient,) = torch.autograd.grad(share.sum(), coefficients)
    assert bool(gradient.isfinite().all())


def test_the_extra_term_is_the_exact_kl_of_the_latent_that_is_drawn() -> None:
    schedule = moved(MulanLatentSchedule(SHAPE, latent_size=3), "encoder.out", "decoder")
    assert schedule.context_size == 3 and MulanLatentSchedule(SHAPE, tells_network=False).context_size is None
    x, noise = torch.randn(5, *SHAPE), {"latent": torch.randn(5, 3)}
    extras, gamma = schedule.bind(x, noise)
    mean, log_variance = schedule.encoder(x).chunk(2, 1)
    q, t = Normal(mean, torch.exp(log_variance / 2)), torch.full((5,), 0.4)
    assert list(extras) == ["latent"]
    torch.testing.assert_close(extras["latent"], kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    drawn = {"latent": q.mean + q.stddev * noise["latent"]}
    none, given_latent = schedule.bind(None, drawn)  # sampling from p, that very latent
    assert not none
    torch.testing.assert_close(gamma(t), given_latent(t))
    torch.testing.assert_close(gamma.context, drawn["latent"])  # what the network is told
    assert float(gamma(t).detach().flatten(1).std(0).min()) > 1e-3  # data differ in their gamma


@pytest.mark.parametrize("shape", [[8, 8], [1, 8, 0], [1, 8, 8.0]])
def test_a_shape_that_is_none_is_refused(shape: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="height"):
        MulanSchedule(shape)


def test_data_of_another_shape_are_refused() -> None:
    for schedule in (MulanSchedule([1, 8, 8]), MulanLatentSchedule([1, 8, 8])):
        with pytest.raises(ConfigurationError, match="shape"):
            schedule.bind(torch.zeros(2, 3, 8, 8), schedule.draw_noise(2, None, torch.device("cpu")))
    with pytest.raises(ConfigurationError, match="bind"):
        MulanLatentSchedule([1, 8, 8])(torch.zeros(1))
    for name, context_size in (("mulan", None), ("mulan_latent", 8)):
        scheduler = VDMScheduler(noise_schedule={"name": name, "config": {"shape": [1, 4, 4]}}, num_levels=17)
        with pytest.raises(ConfigurationError, match=naming("(1, 4, 4)", "(1, 8, 8)")):
            VDMPipeline(tiny_unet(context_size=context_size), scheduler)
    with pytest.raises(ConfigurationError, match="'latent_size': 0"):
        MulanLatentSchedule([1, 8, 8], latent_size=0)


# ---- the whole way --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each form, by its name."""
    schedules = {
        name: {"name": name, "config": ENDS | {"shape": [1, 8, 8]}, "package": PACKAGE}
        for name in ("mulan", "mulan_latent")
    }
    folder = tmp_path_factory.mktemp("runs")
    return {name: train_a_little(folder / name, noise_schedule=form) for name, form in schedules.items()}


@pytest.mark.parametrize("name", ["mulan", "mulan_latent"])
def test_the_whole_way(runs: dict[str, Path], name: str) -> None:
    check_the_whole_way(runs[name], "digits")


@pytest.mark.slow
def test_without_the_package_loading_says_what_to_install(runs: dict[str, Path], tmp_path: Path) -> None:
    messages = errors_without_plugins(tmp_path / "site-packages", *runs.values())
    for name, message in zip(runs, messages, strict=True):
        assert f"'{name}'" in message and f"pip install {PACKAGE}" in message and "unverified" in message


@pytest.mark.parametrize("name", ["mulan", "mulan_latent"])
def test_the_schedule_travels_in_float32(runs: dict[str, Path], name: str) -> None:
    pipe = VDMPipeline.from_pretrained(runs[name] / "pipeline").to(torch.float16)
    weights = pipe.noise_schedule.module.state_dict()
    fresh = (MulanSchedule if name == "mulan" else MulanLatentSchedule)([1, 8, 8], **ENDS).state_dict()
    assert weights.keys() == fresh.keys()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert not torch.equal(weights["gamma_min"], fresh["gamma_min"])
    report = pipe.to(torch.float32).bits_per_dim(torch.zeros(2, 1, 8, 8), replicates=2)
    assert ("latent" in report.terms) == (name == "mulan_latent")
