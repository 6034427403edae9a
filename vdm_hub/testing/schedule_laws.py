"""The laws of a noise schedule: what `NoiseSchedule` promises, and the rest of the library relies on.

A schedule is always taken through `bind`, so that one with a gamma per pixel, or with a latent of its own, is under
the same laws as a scalar one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vdm_hub import registry
from vdm_hub.diffusion.noise_schedules import Gamma, NoiseSchedule, gamma_and_derivative
from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.subjects import (
    BATCH,
    CPU,
    OWN_TERMS,
    SHAPE,
    cast,
    evaluated,
    json_round_trip,
    one_each,
    require_close,
    require_finite,
    require_registered,
    seeded,
    trained,
)

SCHEDULE_LAWS = Laws("noise_schedules", NoiseSchedule)


def _data(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(BATCH, *SHAPE, generator=seeded(1)) * 2 - 1).to(dtype)


def _bound(schedule: NoiseSchedule, copies: int = 1, sampling: bool = False) -> tuple[dict[str, Tensor], Gamma]:
    """Extras and gamma of the batch, each datum as often in a row as told, in the type of the parameters."""
    dtype = next((p.dtype for p in schedule.parameters()), torch.float64)
    noise = cast(schedule.draw_noise(BATCH, one_each(*range(BATCH)), CPU), dtype)
    noise = {name: value.repeat_interleave(copies, 0) for name, value in noise.items()}
    return schedule.bind(None if sampling else _data(dtype).repeat_interleave(copies, 0), noise)


def _paths(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Gamma of each datum along the times, (BATCH, len(times), dimensions or 1)."""
    with torch.no_grad():
        gamma = _bound(schedule, len(times))[1](times.repeat(BATCH))
    return (
        gamma.reshape(BATCH, len(times), -1) if gamma.shape[:1] == (BATCH * len(times),) else gamma.reshape(1, 1, -1)
    )


def _grid(points: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64).to(dtype)


def _states(schedule: NoiseSchedule, dtype: torch.dtype) -> Iterator[NoiseSchedule]:
    """The schedule as it is, and as it may be after training."""
    yield evaluated(schedule, dtype)
    if any(True for _ in schedule.parameters()):
        yield trained(schedule, dtype)


@SCHEDULE_LAWS.add
def shape_and_dtype(schedule: NoiseSchedule) -> None:
    """The gamma of times (B,) is (B,), or broadcasts to (B, *data), and keeps the type of the times."""
    for dtype in (torch.float32, torch.float64):
        # Samplers give float64 times to a schedule whose parameters stay in float32.
        for sampling in (False, True):
            gamma = _bound(evaluated(schedule), sampling=sampling)[1](torch.linspace(0, 1, BATCH, dtype=dtype))
            require(isinstance(gamma, Tensor), f"gamma is a {type(gamma).__name__}, not a tensor")
            require(gamma.dtype == dtype, f"gamma of {dtype} times is {gamma.dtype}")
            shape = tuple(gamma.shape)
            if schedule.scalar:
                require(shape == (BATCH,), f"it says scalar = True, and gamma of {BATCH} times has the shape {shape}")
            else:
                fits = len(shape) == 1 + len(SHAPE) and shape[0] == BATCH
                fits = fits and all(size in (1, full) for size, full in zip(shape[1:], SHAPE, strict=True))
                wanted = f"it says scalar = False, so it must broadcast to {(BATCH, *SHAPE)} with one row a datum"
                require(fits, f"gamma of {BATCH} times has the shape {shape}; {wanted}")


@SCHEDULE_LAWS.add
def finite(schedule: NoiseSchedule) -> None:
    """The gamma is finite on [0, 1], both ends included."""
    for dtype in (torch.float32, torch.float64):
        times = _grid(1025, dtype)
        for state in _states(schedule, dtype):
            gamma = _paths(state, times)
            wrong = (~gamma.isfinite()).any(-1).any(0).nonzero()
            where = f"t = {times[wrong[0]].item():g}" if len(wrong) else ""
            value = gamma[~gamma.isfinite()][:1].tolist()
            require(gamma.isfinite().all(), f"gamma is {value} at {where} in {dtype}: cut the schedule in t")


@SCHEDULE_LAWS.add
def strictly_increasing(schedule: NoiseSchedule) -> None:
    """The gamma increases strictly with t, in each dimension, also in float32 on a grid of 1,024 steps."""
    for dtype in (torch.float32, torch.float64):
        times = _grid(1025, dtype)
        for state in _states(schedule, dtype):
            gamma = _paths(state, times)
            step = torch.where(gamma.isfinite(), gamma, torch.nan).diff(dim=1)
            bad = (step <= 0).nonzero()
            if len(bad):
                datum, index, dimension = bad[0].tolist()
                before, after = gamma[datum, index : index + 2, dimension].tolist()
                message = (
                    f"gamma({times[index].item():g}) = {before:.9g}, gamma({times[index + 1].item():g}) = {after:.9g}"
                )
                require(False, f"{message} in {dtype}. gamma is -log SNR, which rises from data to noise")


@SCHEDULE_LAWS.add
def derivative(schedule: NoiseSchedule) -> None:
    """The forward-mode derivative of gamma is its slope, with gradients enabled or not."""
    step = 1e-6
    times = (torch.arange(257, dtype=torch.float64) + 0.618034) / 258  # off the knots of a table
    for state in _states(schedule, torch.float64):
        slope = (_paths(state, times + step) - _paths(state, times - step)) / (2 * step)
        gamma = _bound(state, len(times))[1]
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                found = gamma_and_derivative(gamma, times.repeat(BATCH))[1].detach().clone()
            found = found.reshape(slope.shape)
            mode = f"gamma'(t) under torch.{context.__name__}"
            require_close(torch.where(slope.isfinite(), found, slope), slope, mode, rtol=1e-4, atol=1e-5)


@SCHEDULE_LAWS.add
def parameters_are_trained(schedule: NoiseSchedule) -> None:
    """Every parameter that asks for a gradient gets one from gamma, gamma' or an extra term of the bound."""
    state = trained(schedule).train()
    parameters = {name: p for name, p in state.named_parameters() if p.requires_grad}
    if not parameters:
        return
    extras, gamma = _bound(state, 16)
    times = torch.rand(16 * BATCH, generator=seeded(2))
    values = (*gamma_and_derivative(gamma, times), *extras.values())
    loss = torch.stack(
        [(value * torch.randn(value.shape, generator=seeded(i))).sum() for i, value in enumerate(values)]
    )
    gradients = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        require(gradient is not None and bool((gradient != 0).any()), f"the parameter {name!r} gets no gradient")
        if gradient is not None:
            require_finite(gradient, f"the gradient of the parameter {name!r}")


@SCHEDULE_LAWS.add
def variance_parameters(schedule: NoiseSchedule) -> None:
    """What the estimator's variance trains are parameters by name, which leave the endpoints where they are."""
    names, parameters = schedule.variance_parameters(), dict(schedule.named_parameters())
    unknown = sorted(set(names) - parameters.keys())
    require(
        not unknown, f"variance_parameters() names {unknown}, which are no parameters; it has {sorted(parameters)}"
    )
    require(schedule.scalar or not names, "a gamma per dimension is trained by the bound alone, but it names some")
    if not names:
        return
    state = trained(schedule, torch.float64)
    shape = [parameter for name, parameter in state.named_parameters() if name in names]
    for end in (0.0, 1.0):
        gamma = state(torch.tensor([end], dtype=torch.float64)).sum()
        for name, gradient in zip(sorted(names), torch.autograd.grad(gamma, shape, allow_unused=True), strict=True):
            size = 0.0 if gradient is None else float(gradient.abs().max())
            require(size < 1e-8, f"gamma({end:g}) moves with {name!r} (gradient {size:.3g}): the bound must train it")


@SCHEDULE_LAWS.add
def endpoints(schedule: NoiseSchedule) -> None:
    """Its `endpoints` gives (gamma(0), gamma(1)) of a scalar schedule."""
    if schedule.scalar:
        for state in _states(schedule, torch.float64):
            ends = _paths(state, _grid(2, torch.float64))[0, :, 0]
            require_close(torch.tensor(state.endpoints(), dtype=torch.float64), ends, "endpoints()")


@SCHEDULE_LAWS.add
def inverse(schedule: NoiseSchedule) -> None:
    """Its `inverse` finds the time of a scalar schedule's gamma, clamped to [0, 1]."""
    if schedule.scalar:
        times = _grid(65, torch.float64)
        for state in _states(schedule, torch.float64):
            gamma = _paths(state, times)[0, :, 0]
            require_close(state.inverse(gamma), times, "inverse(gamma(t))", rtol=0, atol=1e-6)
            outside = torch.stack([gamma[0] - 1, gamma[-1] + 1])
            require_close(state.inverse(outside), times[[0, -1]], "inverse() of a gamma beyond the ends")


@SCHEDULE_LAWS.add
def published(schedule: NoiseSchedule) -> None:
    """Its `bake` gives a registered schedule of the same gamma, without parameters if it is scalar."""
    times = _grid(499, torch.float64)  # most of them between any knots
    for state in _states(schedule, torch.float64):
        baked = state.bake()
        require(isinstance(baked, NoiseSchedule), f"bake() gives a {type(baked).__name__}, not a NoiseSchedule")
        if schedule.scalar:
            left = sorted(name for name, _ in baked.named_parameters())
            require(not left, f"bake() leaves the parameters {left}, which scheduler_config.json can't hold")
        if type(baked) is not type(state):
            name = type(baked).__qualname__
            found = registry.registration_of("noise_schedules", type(baked))
            require(found is not None, f"bake() gives a {name}, which is not registered, so no config can name it")
        require_close(
            _paths(baked, times), _paths(state, times), "gamma of bake() (more baked_knots may mend it)", 0, 1e-3
        )


@SCHEDULE_LAWS.add
def json_config(schedule: NoiseSchedule) -> None:
    """Its `to_config` is JSON, and builds the same schedule again, bit for bit once its weights are loaded."""
    config = json_round_trip(schedule.to_config(), "to_config()")
    again = type(schedule)(**config)
    again.load_state_dict(schedule.state_dict())
    for dtype in (torch.float32, torch.float64):
        times = _grid(257, dtype)
        after, before = (_paths(evaluated(one, dtype), times) for one in (again, schedule))
        require_close(after, before, f"gamma of the schedule rebuilt from {config!r:.200}", rtol=0, atol=0)


@SCHEDULE_LAWS.add
def registered(schedule: NoiseSchedule) -> None:
    """The class is the entry point of an installed package, so that a config can name it."""
    require_registered("noise_schedules", type(schedule))


@SCHEDULE_LAWS.add
def extra_terms(schedule: NoiseSchedule) -> None:
    """The extra terms of the bound are one finite number a datum, under names of their own."""
    for state in _states(schedule, torch.float32):
        for name, term in _bound(state)[0].items():
            require(name not in OWN_TERMS, f"the extra term {name!r} would replace the bound's own")
            require(
                tuple(term.shape) == (BATCH,), f"the extra term {name!r} has the shape {tuple(term.shape)}, not (B,)"
            )
            require_finite(term, f"the extra term {name!r}")


@SCHEDULE_LAWS.add
def draws_follow_their_generator(schedule: NoiseSchedule) -> None:
    """The base noise of a datum comes from its own generator alone, wherever it stands in a batch."""
    whole = schedule.draw_noise(BATCH, one_each(*range(BATCH)), CPU)
    last = schedule.draw_noise(1, one_each(BATCH - 1), CPU)
    for name, value in whole.items():
        require(len(value) == BATCH, f"the noise {name!r} of {BATCH} data has the shape {tuple(value.shape)}")
        require(name in last, f"the noise {name!r} of {BATCH} data is missing for one datum")
        require_close(value[-1:], last[name], f"the noise {name!r} of the last datum, alone and in a batch,", 0, 0)


@SCHEDULE_LAWS.add
def data_do_not_mix(schedule: NoiseSchedule) -> None:
    """The gamma and the extra terms of a datum do not depend on the others in its batch."""
    times, x = torch.full((BATCH,), 0.37), _data()
    noise = schedule.draw_noise(BATCH, one_each(*range(BATCH)), CPU)
    last = {name: value[-1:] for name, value in noise.items()}
    for state in _states(schedule, torch.float32):
        whole, alone = _at(state, x, noise, times), _at(state, x[-1:], last, times[-1:])
        for name, value in alone.items():
            require_close(whole[name][-1:], value, f"{name} of a datum in a batch, against alone,", 1e-4, 1e-4)


def _at(schedule: NoiseSchedule, x: Tensor | None, noise: dict[str, Tensor], times: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        extras, gamma = schedule.bind(x, noise)
        return {"gamma": gamma(times)} | extras


@SCHEDULE_LAWS.add
def no_peeking(schedule: NoiseSchedule) -> None:
    """Without a latent of its own, drawn by draw_noise, gamma does not depend on the data."""
    if schedule.draw_noise(BATCH, seeded(0), CPU):
        return
    times = torch.full((BATCH,), 0.37)
    for state in _states(schedule, torch.float32):
        bounding, sampling = _at(state, _data(), {}, times)["gamma"], _at(state, None, {}, times)["gamma"]
        require_close(bounding, sampling, "gamma given the data, against gamma while sampling,", rtol=0, atol=1e-6)


@SCHEDULE_LAWS.add
def what_data_tell_is_paid_for(schedule: NoiseSchedule) -> None:
    """Where gamma follows the data through a latent, its KL is among the extra terms, and is positive on average."""
    copies = 64
    noise = schedule.draw_noise(BATCH * copies, seeded(0), CPU)
    if not noise:
        return
    times, x = torch.full((BATCH * copies,), 0.37), _data().repeat(copies, 1, 1, 1)
    for state in _states(schedule, torch.float32):
        given, alone = _at(state, x, noise, times), _at(state, None, noise, times)["gamma"]
        follows = float((given.pop("gamma") - alone).abs().max())
        paid = torch.stack([*given.values(), torch.zeros(len(x))]).sum(0).double()
        noisy = 4 * float(paid.std()) / len(paid) ** 0.5
        require(
            float(paid.mean()) > (0 if follows > 1e-4 else -noisy - 1e-6),
            f"gamma differs by up to {follows:.3g} from that of the same base noise without data, and the extra terms "
            f"{sorted(given)} are {float(paid.mean()):.3g} nats a datum",
        )
