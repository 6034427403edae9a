"""Law 1: one denoiser seen through all targets gives one loss. And what each target means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import registered
from exact_denoisers import ExactDenoiser, Mixture
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.parameterizations import EDMPrediction, VEScore

TARGETS = registered.names("parameterizations")
every_target = pytest.mark.parametrize("target", TARGETS)
every_conditioning = pytest.mark.parametrize("conditioning", registered.names("conditionings"))
every_schedule = pytest.mark.parametrize("schedule", registered.names("noise_schedules"))

POPULATION = Mixture(
    torch.tensor([-0.7, 0.1, 0.6], dtype=torch.float64),
    torch.tensor([0.01, 0.2, 0.03], dtype=torch.float64),
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
)
BATCH, SHAPE = 24, (3, 4, 4)
DIMENSIONS = 48


def losses(process: GaussianProcess, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Continuous and finite-T losses per datum, and the weights that turn ``|eps - eps_hat|^2 / D`` into them."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (BATCH, *SHAPE), generator=generator)
    x = process.scaling.encode(levels, dtype)
    noise = {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name in ("marginal", "reconstruction")
    }
    t = ((torch.arange(BATCH, dtype=torch.float64) + 1) / BATCH).to(dtype)
    s = t - 1 / BATCH
    bound = process.bind(x, noise)[1]
    network = ExactDenoiser(POPULATION, process).bare
    with torch.no_grad():
        rate = bound.kl_rate(x, t, noise, network)
        kl = bound.transition_kl(x, s.clamp(min=0), t, noise, network)
        gamma_s, gamma_t = process.schedule(s.clamp(min=0)), process.schedule(t)
        prime = torch.func.jvp(process.schedule, (t,), (torch.ones_like(t),))[1]
    weights = 0.5 * DIMENSIONS * torch.stack([prime, torch.expm1(gamma_t - gamma_s)])
    return torch.stack([rate, kl]), weights


@every_target
@every_conditioning
@every_schedule
def test_law_1_one_denoiser_gives_one_loss_in_float64(schedule: str, conditioning: str, target: str) -> None:
    def of(name: str) -> Tensor:
        return losses(registered.process(registered.scalar_schedule(schedule), name, conditioning), torch.float64)[0]

    torch.testing.assert_close(of(target), of("epsilon"), rtol=1e-6, atol=0)


@every_target
@every_conditioning
@every_schedule
def test_law_1_one_denoiser_gives_one_loss_in_float32(schedule: str, conditioning: str, target: str) -> None:
    built = registered.scalar_schedule(schedule)
    exact, _ = losses(registered.process(built, "epsilon", conditioning), torch.float64)
    actual, weights = losses(registered.process(built, target, conditioning), torch.float32)
    # The floor, in mean squared error of eps_hat: what the rounding of x and z_t leaves near zero.
    floor = 1e-5 * weights.double()
    excess = (actual.double() - exact).abs() - 1e-3 * exact - floor
    assert float(excess.max()) <= 0


@every_target
@pytest.mark.parametrize("decoder", registered.names("decoders"))
def test_law_1_one_denoiser_gives_one_reconstruction_term(decoder: str, target: str) -> None:
    def of(name: str) -> Tensor:
        process = registered.process(registered.schedule("linear"), name, decoder=decoder)
        levels = torch.randint(0, 256, (4, *SHAPE), generator=torch.Generator().manual_seed(0))
        x = process.scaling.encode(levels, torch.float64)
        noise = {"reconstruction": torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()}
        return process.bind(x, noise)[1].reconstruction(levels, x, noise, ExactDenoiser(POPULATION, process).bare)

    torch.testing.assert_close(of(target), of("epsilon"), rtol=1e-6, atol=0)


@every_target
@every_schedule
def test_law_1_gradients_reach_the_network(schedule: str, target: str) -> None:
    process = registered.process(registered.scalar_schedule(schedule), target)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    with torch.no_grad():
        for i, parameter in enumerate(body.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    generator = torch.Generator().manual_seed(3)
    x = process.encode(torch.randint(0, 256, (8, *SHAPE), generator=generator))
    noise = process.draw_noise(tuple(x.shape), generator, x.device)
    t = torch.linspace(0, 1, 8)
    bound = process.bind(x, noise)[1]
    for loss in (
        bound.kl_rate(x, t, noise, lambda sample, timestep: body(sample)),
        bound.transition_kl(x, t * 0.5, t * 0.5 + 0.1, noise, lambda sample, timestep: body(sample)),
    ):
        gradients = torch.autograd.grad(loss.mean(), list(body.parameters()), retain_graph=True)
        for gradient in gradients:
            assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


@every_target
@given(gamma=st.floats(-13.3, 13.0), x=st.floats(-1, 1), eps=st.floats(-4, 4), error=st.floats(-1, 1))
def test_target_x_hat_and_eps_hat_are_one_linear_map(
    target: str, gamma: float, x: float, eps: float, error: float
) -> None:
    parameterization = registered.build("parameterizations", target)
    g, data, noise = (torch.tensor([v], dtype=torch.float64) for v in (gamma, x, eps))
    data, noise = data[:, None], noise[:, None]
    alpha, sigma = 1 / torch.sqrt(1 + g.exp()), 1 / torch.sqrt(1 + (-g).exp())
    z = alpha * data + sigma * noise
    output = parameterization.target(data, noise, g)
    # The answer is recovered, as exactly as z, rounded, still holds it.
    tolerance = {"rtol": 1e-9, "atol": 1e-14 * float(1 + 10 / sigma / alpha)}
    torch.testing.assert_close(parameterization.x_hat(output, z, g), data, **tolerance)
    torch.testing.assert_close(parameterization.eps_hat(output, z, g), noise, **tolerance)
    score = parameterization.score_hat(output, z, g)
    torch.testing.assert_close(score * sigma, -noise, **tolerance)
    # A wrong output: eps_hat, x_hat and the weighted error still tell one story.
    scale = float(output.abs()) + 1 / float(parameterization.output_scale(g)) + 1
    wrong = output + error * scale * parameterization.output_scale(g)
    eps_hat, x_hat = parameterization.eps_hat(wrong, z, g), parameterization.x_hat(wrong, z, g)
    torch.testing.assert_close(alpha * x_hat + sigma * eps_hat, z, rtol=1e-8, atol=1e-8 * float((alpha * x_hat).abs()))
    squared = parameterization.eps_error(wrong, data, noise, g)
    torch.testing.assert_close(squared.sqrt(), (noise - eps_hat).abs(), rtol=1e-7, atol=1e-9 * scale / float(alpha))


LUO_TARGETS = {
    "sample": lambda x, eps, bar: x,
    "epsilon": lambda x, eps, bar: eps,
    "score": lambda x, eps, bar: -eps / (1 - bar).sqrt(),
    "v_prediction": lambda x, eps, bar: bar.sqrt() * eps - (1 - bar).sqrt() * x,
}


@pytest.mark.parametrize("target", sorted(LUO_TARGETS))
def test_targets_in_alpha_bar(target: str) -> None:
    x, eps = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    gamma = torch.linspace(-8, 5, 5, dtype=torch.float64)
    bar = (1 / (1 + gamma.exp()))[:, None]
    actual = registered.build("parameterizations", target).target(x, eps, gamma)
    torch.testing.assert_close(actual, LUO_TARGETS[target](x, eps, bar), rtol=1e-9, atol=1e-12)
    # The network's raw output: of the size of the noise where the target grows without bound, else the target.
    raw = actual / registered.build("parameterizations", target).output_scale(gamma)[:, None]
    torch.testing.assert_close(raw, -eps if target == "score" else actual, rtol=1e-9, atol=1e-12)


@every_target
@pytest.mark.parametrize("gamma", [-6.0, -1.0, 2.0])
def test_tweedie_the_exact_denoiser_is_the_gradient_of_the_log_density(target: str, gamma: float) -> None:
    """``score_hat = grad log q(z_t)`` and ``alpha x_hat = z + sigma^2 grad log q(z_t)`` (Luo eq. 131 to 133)."""
    process = registered.process(registered.schedule("linear"), target)
    z = torch.linspace(-2, 2, 31, dtype=torch.float64)[:, None].requires_grad_()
    g = torch.full((31,), gamma, dtype=torch.float64)
    (score,) = torch.autograd.grad(POPULATION.log_density(z, g[:, None]).sum(), z)
    z = z.detach()
    read = process.parameterization.input_scale(g)[:, None] * z
    raw = ExactDenoiser(POPULATION, process).bare(read, process.conditioning(g))
    output = raw * process.parameterization.output_scale(g)[:, None]
    torch.testing.assert_close(process.parameterization.score_hat(output, z, g), score, rtol=1e-8, atol=1e-8)
    alpha, sigma = gaussian.alpha(g)[:, None], gaussian.sigma(g)[:, None]
    tweedie = z + sigma**2 * score
    torch.testing.assert_close(alpha * process.parameterization.x_hat(output, z, g), tweedie, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("prediction_type", "sign"), [(None, 1.0), ("epsilon", 1.0), ("v_prediction", -1.0)])
def test_the_target_edm_is_the_preconditioning_of_karras_et_al(prediction_type: str | None, sign: float) -> None:
    """``D = c_skip y + c_out F(c_in y)`` with ``y = z/alpha`` (arXiv 2206.00364, eq. 7 and table 1), sd = 1/2."""
    target = EDMPrediction() if prediction_type is None else EDMPrediction(prediction_type=prediction_type)
    gamma = torch.linspace(-12, 5, 18, dtype=torch.float64)
    z, output = torch.randn(2, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, y, sd = torch.exp(gamma / 2), z / gaussian.alpha(gamma), 0.5
    denoised = sd**2 / (s**2 + sd**2) * y + sign * s * sd / (s**2 + sd**2).sqrt() * output
    torch.testing.assert_close(target.x_hat(output, z, gamma), denoised, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target.input_scale(gamma) * z, y / (s**2 + sd**2).sqrt(), rtol=1e-12, atol=0)


def test_the_target_ve_score_is_the_score_of_exploding_variances() -> None:
    """Of ``y = x + s eps`` (arXiv 2011.13456, app. B): ``x + s^2 score = y`` where the network is exact."""
    target, gamma = VEScore(), torch.linspace(-12, 5, 18, dtype=torch.float64)
    z, output = torch.randn(2, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = target.input_scale(gamma) * z
    torch.testing.assert_close(y, z / gaussian.alpha(gamma), rtol=1e-12, atol=0)
    torch.testing.assert_close(target.x_hat(output, z, gamma), y + torch.exp(gamma) * output, rtol=1e-10, atol=1e-10)
