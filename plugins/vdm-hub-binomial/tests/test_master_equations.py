"""The continuous limit of binomial diffusion: master equations against `torch.matrix_exp`, in float64, by autograd."""

from __future__ import annotations

import functools

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from vdm_hub_binomial import BinomialProcess, kernels

PROCESSES = [BinomialProcess(exponent) for exponent in (1.0, 1.5, 2.0, 3.0)]
POINTS = [(0.05, 0.1), (0.2, 0.55), (0.4, 0.97), (0.7, 0.71)]
exponents = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: f"exponent {process.exponent}")
points = pytest.mark.parametrize(("s", "t"), POINTS)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def transition(process: BinomialProcess, s: Tensor, t: Tensor) -> Tensor:
    return kernels.transition_matrix(process.lost(s), process.lost(t))


def generator(process: BinomialProcess, t: Tensor) -> Tensor:
    return kernels.generator(process.lost(t), process.lost_rate(t))


def close(ours: Tensor, theirs: Tensor) -> None:
    """To rounding; `torch.matrix_exp` itself stops its series at about 1e-11."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def several(matrix: Tensor, bits: int) -> Tensor:
    """The kernel of independent bits."""
    return functools.reduce(torch.kron, [matrix] * bits)


def kronecker_sum(matrix: Tensor, bits: int) -> Tensor:
    """The generator of independent bits, of which one flips at a time."""
    eye = torch.eye(2, dtype=torch.float64)
    return sum(
        (functools.reduce(torch.kron, [matrix if i == j else eye for j in range(bits)]) for i in range(bits)),
        torch.zeros(2**bits, 2**bits, dtype=torch.float64),
    )


@exponents
def test_the_generator_is_the_one_of_the_signal(process: BinomialProcess) -> None:
    """``beta = -d log a/dt``, and a generator's rows sum to zero."""
    for t in (0.1, 0.5, 0.9):
        log_signal = torch.func.grad(lambda time: process.signal(time).log())
        beta = -log_signal(scalar(t))
        close(generator(process, scalar(t)), 0.5 * beta * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double())


@exponents
@points
@pytest.mark.parametrize("bits", [1, 3])
def test_transitions_are_the_exponential_of_the_integrated_generator(
    process: BinomialProcess, s: float, t: float, bits: int
) -> None:
    """Of several bits, the Kronecker product of transitions is that of the Kronecker sum of generators."""
    times, weights = (torch.tensor(each) for each in _gauss_legendre(s, t))
    terms = (w * kronecker_sum(generator(process, time), bits) for w, time in zip(weights, times, strict=True))
    integral = sum(terms, torch.zeros(2**bits, 2**bits, dtype=torch.float64))
    close(several(transition(process, scalar(s), scalar(t)), bits), torch.matrix_exp(integral))


def _gauss_legendre(s: float, t: float) -> tuple[list[float], list[float]]:
    nodes, weights = leggauss(120)
    half = (t - s) / 2
    return list(s + half * (nodes + 1)), list(half * weights)


@exponents
@points
@pytest.mark.parametrize("bits", [1, 3])
def test_both_master_equations(process: BinomialProcess, s: float, t: float, bits: int) -> None:
    def matrix(first: Tensor, last: Tensor) -> Tensor:
        return several(transition(process, first, last), bits)

    here = scalar(s), scalar(t)
    at_s, at_t = (kronecker_sum(generator(process, time), bits) for time in here)
    close(torch.func.jacfwd(matrix, 1)(*here), matrix(*here) @ at_t)  # forward, in (t, z_t)
    close(torch.func.jacfwd(matrix, 0)(*here), -at_s @ matrix(*here))  # backward, in (s, z_s)


@exponents
def test_chapman_kolmogorov(process: BinomialProcess) -> None:
    s, u, t = (scalar(value) for value in (0.1, 0.45, 0.8))
    close(transition(process, s, u) @ transition(process, u, t), transition(process, s, t))


@exponents
@points
@pytest.mark.parametrize("bit", [0, 1])
def test_the_reverse_chain_solves_its_own_master_equation(
    process: BinomialProcess, s: float, t: float, bit: int
) -> None:
    """``q(z_s|z_t, x)``, by Bayes' rule, as s falls: ``-dR/ds = R Q_reverse(s)``; its marginals are those of q."""
    zero = scalar(0.0)

    def marginal(time: Tensor) -> Tensor:
        return transition(process, zero, time)[bit]

    def posterior(first: Tensor) -> Tensor:  # rows by z_t, columns by z_s
        last = scalar(t)
        return (marginal(first)[:, None] * transition(process, first, last) / marginal(last)).mT

    reverse = kernels.reverse_generator(generator(process, scalar(s)), marginal(scalar(s)))
    close(reverse.sum(-1), torch.zeros(2, dtype=torch.float64))
    close(-torch.func.jacfwd(posterior)(scalar(s)), posterior(scalar(s)) @ reverse)
    close(-torch.func.jacfwd(marginal)(scalar(s)), marginal(scalar(s)) @ reverse)


@exponents
def test_bits_that_depend_on_each_other_run_backwards_too(process: BinomialProcess) -> None:
    """``-dq/ds = q Q_reverse(s)``, with the q of any data in the place of that of one bit."""
    data = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    s = scalar(0.4)

    def marginal(time: Tensor) -> Tensor:
        return data @ several(transition(process, scalar(0.0), time), 3)

    reverse = kernels.reverse_generator(kronecker_sum(generator(process, s), 3), marginal(s))
    close(-torch.func.jacfwd(marginal)(s), marginal(s) @ reverse)


def test_a_chain_that_is_not_symmetric_runs_backwards_too() -> None:
    """A bit's generator is its own transpose, so it cannot tell whether the reverse one transposes it."""
    forward = torch.tensor([[-1.5, 1.0, 0.5], [0.2, -0.3, 0.1], [2.0, 0.7, -2.7]], dtype=torch.float64)
    data = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)  # two chains at once
    s, t = scalar(0.6), scalar(0.9)

    def marginal(time: Tensor) -> Tensor:
        return data @ torch.matrix_exp(time * forward)

    def posterior(first: Tensor) -> Tensor:  # rows by z_t, columns by z_s
        joint = marginal(first)[..., None] * torch.matrix_exp((t - first) * forward)
        return (joint / marginal(t)[..., None, :]).mT

    reverse = kernels.reverse_generator(forward, marginal(s))
    close(-torch.func.jacfwd(posterior)(s), posterior(s) @ reverse)


@exponents
@pytest.mark.parametrize("agrees", [True, False])
def test_a_short_step_of_the_reverse_process_flips_at_that_rate(process: BinomialProcess, agrees: bool) -> None:
    """`kernels.flip_probability` with the data known, over dt -> 0, is the reverse generator's rate."""
    t = scalar(0.6)
    marginal = transition(process, scalar(0.0), t)[1]  # of x = 1
    state = 1 if agrees else 0
    rate = kernels.reverse_generator(generator(process, t), marginal)[state, 1 - state]
    known = scalar(float("inf") if agrees else float("-inf"))

    def flip(dt: Tensor) -> Tensor:
        return kernels.flip_probability(known, process.lost(t - dt), process.lost(t))

    close(torch.func.grad(flip)(scalar(0.0)), rate)


@pytest.mark.parametrize("transitions", [1, 5, 40])
def test_the_chain_of_steps_lies_on_the_continuous_one(transitions: int) -> None:
    """SD15's steps with ``beta_t = 1/(T - t + 1)``: their product is the continuous kernel at t/T, for every T."""
    process = BinomialProcess(1.0)
    whole = torch.eye(2, dtype=torch.float64)
    for t in range(1, transitions + 1):
        beta = 1 / (transitions - t + 1)
        whole = whole @ torch.tensor([[1 - beta / 2, beta / 2], [beta / 2, 1 - beta / 2]], dtype=torch.float64)
        close(whole, transition(process, scalar(0.0), scalar(t / transitions)))


@exponents
def test_short_steps_converge_to_the_continuous_chain(process: BinomialProcess) -> None:
    """T of SD15's steps, ``I + Q/T``, tend to the kernel, and T (step of the process - I) to Q: both as 1/T."""
    start, end = scalar(0.1), scalar(0.8)
    whole, rates = transition(process, start, end), generator(process, end)
    eye = torch.eye(2, dtype=torch.float64)
    errors = []
    for transitions in (200, 400, 800):
        dt = (end - start) / transitions
        steps = [eye + dt * generator(process, start + k * dt) for k in range(1, transitions + 1)]
        step = transition(process, end - dt, end)
        errors.append([torch.linalg.multi_dot(steps) - whole, (step - eye) / dt - rates])
    for coarse, fine, finest in zip(*errors, strict=True):
        assert finest.abs().max() < 0.02
        torch.testing.assert_close(coarse / fine, torch.full_like(fine, 2.0), rtol=0.03, atol=0)
        torch.testing.assert_close(fine / finest, torch.full_like(fine, 2.0), rtol=0.015, atol=0)
