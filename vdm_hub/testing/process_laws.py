"""The laws of a forward process: what `ForwardProcess` and `BoundProcess` promise, whatever the process is.

They know the interface alone: no gamma, no target. Where a law needs a perfect network, its output is found by
minimising the process' own transition KL.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from vdm_hub import registry
from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess, Network
from vdm_hub.errors import ConfigurationError
from vdm_hub.testing.laws import Laws, LawViolation, require
from vdm_hub.testing.subjects import (
    BATCH,
    CPU,
    OWN_TERMS,
    cast,
    evaluated,
    json_round_trip,
    one_each,
    require_close,
    require_finite,
    require_registered,
    require_shape,
    seeded,
)

PROCESS_LAWS = Laws("forward_processes", ForwardProcess)


class FakeNetwork:
    """No denoiser of anything: smooth, and dependent on both of its inputs, an output of each dimension on it alone.

    Args:
        process: It says the output's shape.
        scale: Of the output.
    """

    def __init__(self, process: ForwardProcess, scale: float = 0.7) -> None:
        self.scale = scale
        self.shape = process.output_shape(process.latent_shape((1, *process.example_shape))[1:])

    def __call__(self, sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        """The output at a sample and its timestep."""
        if not sample.is_floating_point():  # ids of tokens
            sample = sample.to(torch.as_tensor(timestep).dtype)
        level = torch.as_tensor(timestep, device=sample.device).reshape(-1, *(1,) * (sample.ndim - 1))
        output = torch.tanh(self.scale * sample + 0.3 * torch.sin(level / 300).to(sample.dtype))
        if self.shape[:-1] == sample.shape[1:]:  # several numbers of each dimension, such as the logits of a token
            return output.unsqueeze(-1) * torch.linspace(-1, 1, self.shape[-1], dtype=sample.dtype)
        output = output.flatten(1)
        entries = math.prod(self.shape)
        if entries != output.shape[1]:
            each = torch.linspace(-1, 1, -(-entries // output.shape[1]), dtype=sample.dtype)
            output = (output[:, None, :] * each[:, None]).flatten(1)[:, :entries]
        return output.reshape(len(sample), *self.shape)


class BoundBatch:
    """A batch for the laws: levels, data, noise, and the process bound to them."""

    def __init__(self, process: ForwardProcess, size: int = BATCH, dtype: torch.dtype = torch.float32) -> None:
        self.process, shape = evaluated(process, dtype), (size, *process.example_shape)
        self.network = FakeNetwork(process)
        self.levels = torch.randint(0, process.num_levels, shape, generator=seeded(1))
        self.x = self.process.encode(self.levels).to(dtype)
        self.noise = cast(self.process.draw_noise(shape, one_each(*range(size)), CPU), dtype)
        self.s = torch.linspace(0.2, 0.6, size, dtype=dtype)
        self.t = self.s + 0.2

    def rows(self, rows: slice) -> BoundBatch:
        """The batch of some of its data."""
        part = object.__new__(BoundBatch)
        part.process, part.network = self.process, self.network
        part.noise = {name: value[rows] for name, value in self.noise.items()}
        part.levels, part.x, part.s, part.t = self.levels[rows], self.x[rows], self.s[rows], self.t[rows]
        return part

    def bind(self) -> tuple[dict[str, Tensor], BoundProcess]:
        """The extras, and the process bound to the batch."""
        return self.process.bind(self.x, self.noise)

    def terms(self) -> dict[str, Tensor]:
        """Every term that the bound may hold, by the name of the method that gives it, and the extras."""
        extras, bound = self.bind()
        terms = {
            "prior_kl": bound.prior_kl(self.x),
            "reconstruction": bound.reconstruction(self.levels, self.x, self.noise, self.network),
            "transition_kl": bound.transition_kl(self.x, self.s, self.t, self.noise, self.network),
        }
        rate = self.rate(bound, self.network)
        return terms | ({} if rate is None else {"kl_rate": rate}) | {f"the extra {n}": v for n, v in extras.items()}

    def rate(self, bound: BoundProcess, network: Network) -> Tensor | None:
        """The rate of the KL, or ``None`` where the process says that it has none."""
        try:
            return bound.kl_rate(self.x, self.t, self.noise, network)
        except ConfigurationError:
            return None


@PROCESS_LAWS.add
def levels_round_trip(process: ForwardProcess) -> None:
    """Its `quantise` undoes `encode`, gives int64, and clamps what a sampler left outside the data."""
    levels = torch.arange(process.num_levels)
    x = process.encode(levels)
    require(x.is_floating_point(), f"encode() gives {x.dtype}, not floating point")
    require_finite(x, "encode()")
    back = process.quantise(x)
    require(back.dtype == torch.int64, f"quantise() gives {back.dtype}, not int64")
    wrong = (back != levels).nonzero().flatten().tolist()
    require(not wrong, f"quantise(encode({wrong[:1]})) is {back[wrong[:1]].tolist()}")
    outside = process.quantise(torch.stack([x.min() - 10, x.max() + 10]))
    inside = bool((outside >= 0).all() & (outside < process.num_levels).all())
    require(
        inside, f"quantise() of values 10 beyond the data is {outside.tolist()}, not in 0..{process.num_levels - 1}"
    )


@PROCESS_LAWS.add
def draws_follow_their_generator(process: ForwardProcess) -> None:
    """The base noise of a datum comes from its own generator alone, wherever it stands in a batch."""
    for draw in (process.draw_noise, process.draw_context):
        shape = process.example_shape
        whole, last = draw((BATCH, *shape), one_each(*range(BATCH)), CPU), draw((1, *shape), one_each(BATCH - 1), CPU)
        what = f"{draw.__name__}() gives" if whole.keys() != last.keys() else ""
        require(not what, f"{what} {sorted(whole)} for a batch and {sorted(last)} for one datum")
        for name, value in whole.items():
            require(len(value) == BATCH, f"the noise {name!r} of {BATCH} data has the shape {tuple(value.shape)}")
            require_close(value[-1:], last[name], f"the noise {name!r} of the last datum, in a batch and alone,", 0, 0)


@PROCESS_LAWS.add
def terms(process: ForwardProcess) -> None:
    """Every term of the bound is one finite number a datum, and an extra one has a name of its own."""
    batch = BoundBatch(process)
    for name, term in batch.terms().items():
        require_shape(term, (BATCH,), name)
        require(term.is_floating_point(), f"{name} is {term.dtype}")
        require_finite(term, name)
    clash = sorted(set(batch.bind()[0]) & set(OWN_TERMS))
    require(not clash, f"the extra terms {clash} would replace the bound's own")


@PROCESS_LAWS.add
def never_negative(process: ForwardProcess) -> None:
    """The KLs and -log p(x|z_0) are never negative: a probability of K levels is at most one."""
    for name, term in BoundBatch(process).terms().items():
        if not name.startswith("the extra "):
            require(not bool((term < -1e-3).any()), f"{name} is {term.min().item():.6g} nats")


@PROCESS_LAWS.add
def data_do_not_mix(process: ForwardProcess) -> None:
    """The terms and the latent of a datum do not depend on the others in its batch."""
    batch = BoundBatch(process)
    last = slice(BATCH - 1, None)
    whole, alone = batch.terms(), batch.rows(last).terms()
    for name, term in alone.items():
        require_close(whole[name][-1:], term, f"{name} of a datum in a batch, against alone,", rtol=1e-3, atol=1e-3)
    part = batch.rows(last)
    z, z_alone = (b.bind()[1].sample(b.x, b.t, b.noise) for b in (batch, part))
    require_close(z[-1:], z_alone, "z_t of a datum in a batch, against alone,", rtol=1e-5, atol=1e-5)


@PROCESS_LAWS.add
def network_inputs(process: ForwardProcess) -> None:
    """The network is called with a finite (B, *data), one timestep a datum in float32 or better, and the context."""
    batch = BoundBatch(process)
    latent = process.latent_shape((1, *process.example_shape))[1:]

    def listen(sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        sizes = {} if process.context_size is None else {"context": process.context_size}
        require(context.keys() == sizes.keys(), f"the network is given {sorted(context)} for a context of {sizes}")
        for name, value in context.items():
            require_shape(value, (BATCH, sizes[name]), f"the {name} that the network is given")
            require_finite(value, f"the {name} that the network is given")
        require_shape(sample, (BATCH, *latent), "the sample that the network is given")
        require_shape(timestep, (BATCH,), "the timestep that the network is given")
        require(
            timestep.dtype in (torch.float32, torch.float64),
            f"the timestep that the network is given is {timestep.dtype}",
        )
        require_finite(sample, "the sample that the network is given")
        require_finite(timestep, "the timestep that the network is given")
        return batch.network(sample, timestep)

    bound = batch.bind()[1]
    z_t = bound.sample(batch.x, batch.t, batch.noise)
    bound.predict(listen, z_t, batch.t)
    bound.predict(listen, z_t, torch.tensor(0.5, dtype=torch.float64))  # as a sampler does
    bound.transition_kl(batch.x, batch.s, batch.t, batch.noise, listen)
    batch.rate(bound, listen)


@PROCESS_LAWS.add
def gradients_reach_the_network(process: ForwardProcess) -> None:
    """Both forms of the diffusion term train the network."""
    batch = BoundBatch(process)
    weight = torch.ones(batch.network.shape, requires_grad=True)
    bound = batch.bind()[1]
    emit: Network = lambda sample, timestep, **context: weight * batch.network(sample, timestep)  # noqa: E731
    losses = {"transition_kl": bound.transition_kl(batch.x, batch.s, batch.t, batch.noise, emit)}
    rate = batch.rate(bound, emit)
    for name, loss in (losses if rate is None else losses | {"kl_rate": rate}).items():
        require(loss.requires_grad, f"{name} has no gradient")
        (gradient,) = torch.autograd.grad(loss.sum(), weight, retain_graph=True)
        require_finite(gradient, f"the gradient of {name}")
        require((gradient != 0).any(), f"the gradient of {name} is zero")


@PROCESS_LAWS.add
def rate_is_the_limit(process: ForwardProcess) -> None:
    """Its `kl_rate` is what T transition KLs tend to as the number of transitions T grows."""
    batch, transitions = BoundBatch(process, dtype=torch.float64), 4096
    bound = batch.bind()[1]
    with torch.no_grad():
        rate = batch.rate(bound, batch.network)
        if rate is not None:
            kl = bound.transition_kl(batch.x, batch.t - 1 / transitions, batch.t, batch.noise, batch.network)
            require_close(
                transitions * kl, rate, f"{transitions} transition KLs, against the rate,", rtol=0.05, atol=0.01
            )


@PROCESS_LAWS.add
def best_output_has_no_kl(process: ForwardProcess) -> None:
    """With the best output for a known datum, p(z_s|z_t) is q(z_s|z_t, x): the transition KL vanishes."""
    fitted = FittedOutput(process)
    per_dimension = fitted.kl / fitted.x[0].numel()
    require(
        per_dimension < 1e-3,
        f"at s = {fitted.s:g}, t = {fitted.t:g} no output of the network brings the KL below {per_dimension:.4g} nats "
        f"per dimension (it is {fitted.kl_at_zero / fitted.x[0].numel():.4g} for an output of zero)",
    )


@PROCESS_LAWS.add
def reverse_step_follows_the_marginal(process: ForwardProcess) -> None:
    """From z_t ~ q(z_t|x), a reverse step with the best output for x gives z_s ~ q(z_s|x)."""
    fitted = FittedOutput(process)
    z_s, estimate = fitted.step()
    require_shape(z_s, tuple(fitted.x.shape), "z_s of reverse_step()")
    require_shape(estimate, tuple(fitted.x.shape), "the estimate of reverse_step()")
    expected = fitted.marginal()
    for level in fitted.levels.unique():
        drawn, wanted = z_s[fitted.levels == level].double(), expected[fitted.levels == level].double()
        for name, power in (("mean", 1), ("variance", 2)):
            centre = 0.0 if power == 1 else wanted.mean()
            ours, theirs = (drawn - centre) ** power, (wanted - centre) ** power
            error = float((ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()) + 1e-5
            require(
                abs(float(ours.mean() - theirs.mean())) < 6 * error,
                f"for data at level {int(level)}, s = {fitted.s:g} and t = {fitted.t:g}, the {name} of z_s is "
                f"{float(ours.mean()):.6g} after reverse_step(), and {float(theirs.mean()):.6g} +- {error:.2g} in "
                f"q(z_s|x)",
            )


class FittedOutput:
    """Data at the lowest and highest level, and the output of a network that knows them: that of the least KL."""

    def __init__(self, process: ForwardProcess, s: float = 0.4, t: float = 0.6, size: int = 64) -> None:
        self.process, self.s, self.t = evaluated(process, torch.float64), s, t
        shape, of_output = (size, *process.example_shape), (size, *FakeNetwork(process).shape)
        for parameter in self.process.parameters():
            parameter.requires_grad_(False)
        self.levels = torch.randint(0, 2, shape, generator=seeded(2)) * (process.num_levels - 1)
        self.levels.flatten(1)[:, 0] = 0  # the same for all data, so that what is drawn of it is of one distribution
        self.x = self.process.encode(self.levels).double()
        self.noise = cast(self.process.draw_noise(shape, seeded(3), CPU), torch.float64)
        self.bound = self.process.bind(self.x, self.noise)[1]
        self.kl_at_zero = self.kl_of(torch.zeros(of_output, dtype=torch.float64))
        self.output = self._fit(torch.zeros(of_output, dtype=torch.float64, requires_grad=True))
        self.kl = self.kl_of(self.output)

    def kl_of(self, output: Tensor) -> float:
        """The transition KL of an output of the network, nats per datum."""
        return float(self._kl(output).detach())

    def _kl(self, output: Tensor) -> Tensor:
        s, t = (torch.full((len(self.x),), time, dtype=torch.float64) for time in (self.s, self.t))
        return self.bound.transition_kl(self.x, s, t, self.noise, lambda sample, timestep, **context: output).mean()

    def _fit(self, output: Tensor) -> Tensor:
        optimizer = torch.optim.LBFGS([output], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def loss() -> float:
            optimizer.zero_grad()
            kl = self._kl(output)
            kl.backward()
            return float(kl.detach())

        with torch.enable_grad():
            optimizer.step(loss)
        return output.detach()

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """z_s from the reverse step, and its estimate of the data, at times as a sampler gives them."""
        s, t = (torch.tensor(time, dtype=torch.float64) for time in (self.s, self.t))
        z_t = self.bound.sample(self.x, t.expand(len(self.x)), self.noise)
        prediction = self.bound.predict(lambda sample, timestep, **context: self.output, z_t, t)
        return self.bound.reverse_step(prediction, z_t, s, t, seeded(4))

    @torch.no_grad()
    def marginal(self) -> Tensor:
        """Draws from q(z_s|x) with other noise, the context the same."""
        other = cast(self.process.draw_noise(tuple(self.x.shape), seeded(5), CPU), torch.float64)
        context = self.process.draw_context(tuple(self.x.shape), seeded(3), CPU).keys()
        noise = {name: self.noise[name] if name in context else value for name, value in other.items()}
        return self.bound.sample(self.x, torch.full((len(self.x),), self.s, dtype=torch.float64), noise)


@PROCESS_LAWS.add
def sampling(process: ForwardProcess) -> None:
    """A chain bound to no data keeps its shape, follows each datum's generator, and decodes to levels."""
    whole, alone = _chain(process, BATCH), _chain(process, 1)
    for name, value in whole.items():
        latent = tuple(process.latent_shape((BATCH, *process.example_shape)))
        require_shape(value, (BATCH, *process.example_shape) if name == "decode()" else latent, name)
        require_finite(value.float(), name)
    for name, value in alone.items():
        require_close(whole[name][:1], value, f"{name} of a datum in a batch, against alone,", rtol=1e-4, atol=1e-4)
    levels = whole["decode()"]
    require(levels.dtype == torch.int64, f"decode() gives {levels.dtype}, not int64")
    low, high = int(levels.min()), int(levels.max())
    require(
        low >= 0 and high < process.num_levels, f"decode() gives {low} to {high}, not 0 to {process.num_levels - 1}"
    )


@torch.no_grad()
def _chain(process: ForwardProcess, size: int) -> dict[str, Tensor]:
    """Three steps from the prior to levels, with a generator for each datum."""
    process, generators, shape = evaluated(process), one_each(*range(size)), (size, *process.example_shape)
    network = FakeNetwork(process)
    context = process.draw_context(shape, generators, CPU)
    unknown = sorted(context.keys() - process.draw_noise(shape, one_each(*range(size)), CPU).keys())
    if unknown:
        raise LawViolation(f"draw_context() gives {unknown}, which draw_noise() does not")
    bound = process.bind(None, context)[1]
    z = bound.prior_sample(tuple(process.latent_shape(shape)), generators, CPU)
    found = {"prior_sample()": z}
    times = torch.linspace(1, 0, 4, dtype=torch.float64)
    for t, s in pairwise(times):
        z, estimate = bound.reverse_step(bound.predict(network, z, t), z, s, t, generators)
    return found | {"z_s": z, "the estimate": estimate, "decode()": bound.decode(z, network, generators)}


@PROCESS_LAWS.add
def given_stays(process: ForwardProcess) -> None:
    """Where a part of the data may be given, it keeps its value in z_t and while sampling, and is in no term."""
    batch = BoundBatch(process)
    given = (torch.arange(batch.x[0].numel()) % 2 == 0).reshape(batch.x.shape[1:]).expand_as(batch.x)
    try:
        bound, of_all = (
            batch.process.bind_given(batch.x, batch.noise, part)[1] for part in (given, torch.ones_like(given))
        )
    except ConfigurationError:  # it takes none
        return
    drawn = bound.prior_sample(tuple(batch.x.shape), seeded(4), CPU).to(batch.x.dtype)
    s, t = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    z_s, estimate = bound.reverse_step(bound.predict(batch.network, drawn, t), drawn, s, t, seeded(5))
    latent = bound.sample(batch.x, batch.t, batch.noise)
    for name, value in {"z_t": latent, "prior_sample()": drawn, "z_s": z_s, "the estimate": estimate}.items():
        require_close(value[given], batch.x[given], f"{name}, where the data are given,", rtol=0, atol=0)
    nothing = {
        "prior_kl": of_all.prior_kl(batch.x),
        "reconstruction": of_all.reconstruction(batch.levels, batch.x, batch.noise, batch.network),
        "transition_kl": of_all.transition_kl(batch.x, batch.s, batch.t, batch.noise, batch.network),
        "kl_rate": batch.rate(of_all, batch.network),
    }
    for name, term in nothing.items():
        if term is not None:
            require_close(term, torch.zeros(BATCH), f"{name} of data that are all given", rtol=0, atol=1e-6)


@PROCESS_LAWS.add
def times(process: ForwardProcess) -> None:
    """The timestep of a sampler's grid increases strictly with time, in float64, and time() undoes it."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    timestep = evaluated(process).timestep(t)
    require_shape(timestep, (101,), "timestep() of 101 times")
    require(timestep.dtype == torch.float64, f"timestep() gives {timestep.dtype}, not float64")
    wrong = (timestep.diff() <= 0).nonzero().flatten().tolist()
    require(not wrong, f"timestep({t[wrong[:1]].tolist()}) is {timestep[wrong[:1]].tolist()}, and no less one later")
    require_close(evaluated(process).time(timestep), t, "time(timestep(t))", rtol=0, atol=1e-5)


@PROCESS_LAWS.add
def json_config(process: ForwardProcess) -> None:
    """The fields are JSON, and build the same process again, with the weights that the pipeline carries."""
    fields = json_round_trip(process.fields(), "fields()")
    again = type(process).from_fields(fields, schedule=process.carried_schedule())
    if process.has_weights:
        weights = process.state_dict()
        missing = sorted(again.state_dict().keys() - weights.keys())
        require(not missing, f"the process rebuilt from its fields has weights of its own: {', '.join(missing[:4])}")
        again.load_state_dict({name: weights[name] for name in again.state_dict()})
    for name in ("num_levels", "num_train_timesteps"):
        after, before = getattr(again, name), getattr(process, name)
        require(after == before, f"{name} of the process rebuilt from its fields is {after}, and was {before}")
    batch, same = BoundBatch(process), BoundBatch(again)
    require_close(same.x, batch.x, "encode() of the process rebuilt from its fields", rtol=0, atol=0)
    after, before = same.terms(), batch.terms()
    require(after.keys() == before.keys(), f"the rebuilt process has the terms {sorted(after)}, not {sorted(before)}")
    for name, value in before.items():
        require_close(after[name], value, f"{name} of the process rebuilt from its fields", rtol=1e-3, atol=1e-3)


@PROCESS_LAWS.add
def registered(process: ForwardProcess) -> None:
    """The class is the entry point of an installed package, and its fields name it."""
    require_registered("forward_processes", type(process))
    named = process.fields().get("forward_process", "gaussian")  # which a scheduler takes where the field is missing
    found, _ = registry.resolve_class("forward_processes", named)
    require(found is type(process), f"fields() names the forward process {named!r}, which is {found.__qualname__}")
