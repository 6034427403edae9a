"""The laws of a forward process that compare what it says with what it draws.

A process that reports a KL which its own samples contradict would give a bound that is none. The KL between two sets
of draws, seen through bins of one pixel, is at most that between the distributions (data processing inequality), so
what is reported may be more, and not less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess
from vdm_hub.testing.laws import require
from vdm_hub.testing.process_laws import PROCESS_LAWS, BoundBatch, FakeNetwork, FittedOutput
from vdm_hub.testing.subjects import BATCH, CPU, cast, evaluated, require_close, require_shape, seeded

_COPIES = 128
_MOST_COPIES, _NUMBERS = 4096, 2**21  # of a datum, where its values are counted; and of probabilities, at most
_BINS = 32
_MARGIN, _NOISE = 0.8, 0.02  # of a KL that is seen: its standard error is below 0.02 nats


def seen_kl(ours: Tensor, theirs: Tensor) -> float:
    """``KL(p || q)`` in nats of draws from p and q, of one dimension, through bins; that of noise taken off.

    >>> p, q = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    >>> seen_kl(p, p.flip(0)) < 1e-9, round(seen_kl(p + 1, q), 1)
    (True, 0.5)
    """
    both = torch.cat([ours, theirs]).double()
    edges = torch.unique(both)
    if len(edges) > _BINS:
        edges = torch.unique(
            torch.quantile(both[:: -(-len(both) // 100_000)], torch.linspace(0, 1, _BINS + 1).double())
        )
        edges = edges[1:-1]
    counts = [
        torch.bincount(torch.bucketize(one.double().contiguous(), edges, right=True), minlength=len(edges) + 1) + 0.5
        for one in (ours, theirs)
    ]
    p, q = (count / count.sum() for count in counts)
    bias = 0.5 * len(p) * (1 / len(ours) + 1 / len(theirs))
    return max(float((p * (p / q).log()).sum()) - bias, 0.0)


@PROCESS_LAWS.add
def transition_kl_is_seen(process: ForwardProcess) -> None:
    """Where the best output is moved in one pixel, the transition KL is at least what draws of z_s show of it."""
    fitted = FittedOutput(process, s=0.5, t=1.0)
    true = _draws(fitted, fitted.output, 4)
    moved, seen = fitted.output, 0.0
    for power in range(-10, 7):  # until it is seen well: too far away, draws do not meet
        moved = fitted.output.clone()
        moved.flatten(1)[:, 0] += 2.0**power
        seen = seen_kl(true, _draws(fitted, moved, 5))
        if seen > 0.3:
            break
    stated = fitted.kl_of(moved)
    require(
        stated > _MARGIN * seen - _NOISE,
        f"from t = 1 to s = 0.5, reverse_step() draws z_s with a KL of at least {seen:.3g} nats in one pixel, and "
        f"transition_kl() tells {stated:.3g}",
    )


def _draws(fitted: FittedOutput, output: Tensor, seed: int) -> Tensor:
    """One pixel of many z_s for each datum, from the reverse step with an output."""
    x, noise = _repeated(fitted.x), {name: _repeated(value) for name, value in fitted.noise.items()}
    with torch.no_grad():
        s, t = (torch.tensor(time, dtype=torch.float64) for time in (fitted.s, fitted.t))
        bound = fitted.process.bind(x, noise)[1]
        z_t = bound.sample(x, t.expand(len(x)), noise)
        prediction = bound.predict(lambda sample, timestep, **context: _repeated(output), z_t, t)
        return bound.reverse_step(prediction, z_t, s, t, seeded(seed))[0].flatten(1)[:, 0]


def _repeated(value: Tensor) -> Tensor:
    return value.repeat(_COPIES, *(1,) * (value.ndim - 1))


@PROCESS_LAWS.add
def prior_kl_is_seen(process: ForwardProcess) -> None:
    """The prior KL is at least what draws of z_1 ~ q(z_1|x), against prior_sample(), show of it."""
    process, shape = evaluated(process), (4096, *process.example_shape)
    levels = torch.randint(0, 2, shape, generator=seeded(2)) * (process.num_levels - 1)
    x = process.encode(levels)
    noise = cast(process.draw_noise(shape, seeded(3), CPU), x.dtype)
    with torch.no_grad():
        bound: BoundProcess = process.bind(x, noise)[1]
        z_1, drawn = (
            bound.sample(x, torch.ones(len(x)), noise),
            bound.prior_sample(tuple(process.latent_shape(shape)), seeded(4), CPU),
        )
        stated = float(bound.prior_kl(x).mean())
    # Of all pixels at a level together: their mean is at most the mean of their KLs, and dimensions of p add up.
    shares = [(levels == level) for level in levels.unique()]
    seen = sum(float(share.double().mean()) * seen_kl(z_1[share], drawn.flatten()) for share in shares)
    seen *= x[0].numel()
    require(
        stated > _MARGIN * seen - 2 * _NOISE,
        f"z_1 of data is a KL of at least {seen:.3g} nats away from prior_sample(), and prior_kl() tells {stated:.3g}",
    )


@PROCESS_LAWS.add
def gaussian_kernels(process: ForwardProcess) -> None:
    """Where it has Gaussian kernels, z_t is a draw of the marginal one, as is z_s of the posterior one."""
    if not process.has_gaussian_kernels:
        return
    batch = BoundBatch(process, size=256, dtype=torch.float64)
    with torch.no_grad():
        bound = batch.bind()[1]
        z_t = bound.sample(batch.x, batch.t, batch.noise)
        eps = torch.randn(z_t.shape, generator=seeded(4), dtype=z_t.dtype)
        z_s = bound.posterior_kernel(batch.x, z_t, batch.s, batch.t).sample(eps)
        for name, z, time in (("z_t of sample()", z_t, batch.t), ("z_s of posterior_kernel()", z_s, batch.s)):
            kernel = bound.marginal_kernel(batch.x, time)
            whitened = (z - kernel.mean) / kernel.scale
            moments = {"mean": whitened, "variance": (whitened**2 - 1) / math.sqrt(2)}  # of mean 0 and deviation 1
            for moment, values in moments.items():
                away = abs(float(values.mean())) * math.sqrt(values.numel())
                require(away < 6, f"the {moment} of {name} is {away:.3g} standard errors from marginal_kernel()'s")


@PROCESS_LAWS.add
def decoder(process: ForwardProcess) -> None:
    """What decode() gives of the data's own z_0 errs as often as the reconstruction term says, or less."""
    batch = BoundBatch(process, size=256)
    with torch.no_grad():
        bound = batch.bind()[1]
        z_0 = bound.sample(batch.x, torch.zeros(len(batch.x)), batch.noise)
        wrong = (bound.decode(z_0, batch.network, seeded(6)) != batch.levels).flatten(1).sum(1).double()
        cost = bound.reconstruction(batch.levels, batch.x, batch.noise, batch.network).double()
        another = FakeNetwork(process, scale=-1.0)
        other = bound.reconstruction(batch.levels, batch.x, batch.noise, another).double()
    dimensions, stated_cost = batch.x[0].numel(), f"reconstruction() is {float(cost.mean()):.4g} nats a datum"
    errors, noise = float(wrong.mean()), 4 * float((wrong.std() + cost.std()) / math.sqrt(len(wrong)))
    # A level that another one beats, or that a draw misses, has p(x|z_0) <= 1/2, or costs -log p >= 1 - p.
    require(
        0.65 * errors <= float(cost.mean()) + noise,
        f"{stated_cost}, and {errors:.4g} of {dimensions} levels are wrong after decode()",
    )
    # Who takes the likeliest level is right at least as often as who draws one: exp(-cost) at least, by Jensen.
    right = 1 - errors / dimensions
    require(
        right > 0.75 * math.exp(-float(cost.mean()) / dimensions) - noise / dimensions,
        f"{stated_cost}, and only {right:.4g} of the levels are right after decode()",
    )
    if torch.equal(cost, other):  # one that asks the network is as good as that is
        guess = dimensions * math.log(process.num_levels)
        require(float(cost.mean()) < guess + noise + _NOISE, f"{stated_cost}, and guessing costs {guess:.4g}")


@PROCESS_LAWS.add
def reconstruction_by_level(process: ForwardProcess) -> None:
    """What is said to be the reconstruction term's expectation by level is the mean of its draws."""
    by_level = process.reconstruction_by_level()
    if by_level is None:
        return
    batch = BoundBatch(process, size=256)
    with torch.no_grad():
        drawn = batch.bind()[1].reconstruction(batch.levels, batch.x, batch.noise, batch.network).double()
    expected = by_level.to(drawn)[batch.levels].flatten(1).sum(1)
    off, error = float((drawn - expected).mean()), float((drawn - expected).std()) / math.sqrt(len(drawn))
    require(
        abs(off) < 6 * error + _NOISE,
        f"reconstruction() is {float(drawn.mean()):.4g} nats a datum, and reconstruction_by_level() tells "
        f"{float(expected.mean()):.4g}",
    )


@PROCESS_LAWS.add
def estimate(process: ForwardProcess) -> None:
    """With the best output for a known datum, the estimate of reverse_step() is that datum."""
    fitted = FittedOutput(process)
    found, extent = fitted.step()[1], float(fitted.x.max() - fitted.x.min())
    error = float((found - fitted.x).abs().mean()) / extent
    require(error < 0.1, f"the estimate is {error:.3g} of the data's range away from them")


@PROCESS_LAWS.add
def one_timestep(process: ForwardProcess) -> None:
    """The network is told the same timestep at a time, whether it is trained, measured or sampled from."""
    batch = BoundBatch(process)
    timesteps: list[Tensor] = []

    def listen(sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        timesteps.append(timestep.detach().double())
        return batch.network(sample, timestep)

    bound = batch.bind()[1]
    bound.predict(listen, bound.sample(batch.x, batch.t, batch.noise), batch.t)
    (wanted,) = timesteps
    timesteps.clear()
    bound.transition_kl(batch.x, batch.s, batch.t, batch.noise, listen)
    batch.rate(bound, listen)
    for timestep in timesteps:
        if timestep.shape == wanted.shape:  # other shapes are another law's
            require_close(timestep, wanted, "the timestep in training, against that of predict(),", 1e-4, 1e-3)


@PROCESS_LAWS.add
def values_are_as_likely_as_said(process: ForwardProcess) -> None:
    """Where latents are values, the prior, q(z_t|z_s) and a reverse step draw them with the probabilities it says."""
    if not process.has_discrete_latents:
        return
    process, k = evaluated(process, torch.float64), process.num_levels
    levels = torch.randint(0, k, (BATCH, *process.example_shape), generator=seeded(1))
    copies = max(min(_MOST_COPIES, _NUMBERS // (levels.numel() * k)), 1)
    x = process.encode(levels.repeat_interleave(copies, 0)).double()
    shape = tuple(x.shape)
    noise = [cast(process.draw_noise(shape, seeded(seed), CPU), torch.float64) for seed in (2, 3)]
    bound, network = process.bind(x, noise[0])[1], FakeNetwork(process)
    zero, s, t = torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)
    each = t.expand(len(x))
    z_s, z_t = bound.sample(x, s.expand(len(x)), noise[0]), bound.sample(x, each, noise[1])
    fixed = x.roll(copies, 0)  # of each datum the same
    output = bound.predict(network, fixed, t)
    with torch.no_grad():
        drawn = {
            "prior_sample()": (bound.prior_sample(shape, seeded(4), CPU), torch.full((*shape, k), 1 / k), 1),
            "sample() at 0.8": (z_t, bound.transition_probabilities(x, zero, t), 1),
            "sample() at 0.8, from 0.4,": (z_t, bound.transition_probabilities(z_s, s, t), 2),
            "reverse_step()": (
                bound.reverse_step(output, fixed, s, t, seeded(5))[0],
                bound.reverse_probabilities(output, fixed, s, t),
                1,
            ),
        }
    for name, (values, probabilities, draws) in drawn.items():
        _require_as_likely(name, process.quantise(values), probabilities.double(), draws)


def _require_as_likely(name: str, values: Tensor, probabilities: Tensor, draws: int) -> None:
    r"""Require values, (B R, \*data), of R copies of each datum, to be draws of probabilities, (B R, \*data, K).

    The statistic is Pearson's, of the values that are expected ten times or more. Its mean is ``sum(1 - p)``; where
    the probabilities are a mean over draws, too, at most twice that.
    """
    k = probabilities.shape[-1]
    require_shape(probabilities, (*values.shape, k), f"the probabilities of {name}")
    low, total = float(probabilities.min()), probabilities.sum(-1)
    require(low >= 0, f"a probability of {name} is {low:.6g}")
    require_close(total, torch.ones_like(total), f"the sum of the probabilities of {name}", rtol=0, atol=1e-6)
    copies = len(values) // BATCH
    shape = (BATCH, copies, *values.shape[1:], k)
    found = torch.nn.functional.one_hot(values, k).double().reshape(shape).sum(1)
    expected = probabilities.reshape(shape).sum(1)
    never = int(found[expected < 1e-9].sum())
    require(never == 0, f"{name} gives {never} values whose probability is zero")
    often = expected >= 10
    away = float(((found - expected) ** 2 / expected)[often].sum())
    mean = draws * float((1 - expected / copies)[often].sum())
    spread = draws * math.sqrt(2 * int(often.sum()))
    require(
        away <= mean + 6 * spread,
        f"the squared differences between how often {name} gives a value and its probability sum to {away:.6g}, and "
        f"of draws to {mean:.6g} +- {spread:.2g}",
    )
