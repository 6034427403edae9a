"""Cells of time and proposals over them: exact sums instead of draws, so tolerances are those of rounding."""

from __future__ import annotations

import pytest
import torch

import registered
from vdm_hub.diffusion.noise_schedules import CosineSchedule, LinearSchedule
from vdm_hub.diffusion.times import discretise, times_of_data
from vdm_hub.likelihood.proposals import Proposal, fit_proposal, root_mean_square
from vdm_hub.likelihood.time_grid import TimeGrid

every_schedule = pytest.mark.parametrize("name", registered.names("noise_schedules"))
every_transitions = pytest.mark.parametrize("transitions", [None, 1, 5, 2000])


def grid_of(name: str, transitions: int | None) -> TimeGrid:
    return TimeGrid.of(registered.process(registered.scalar_schedule(name)), transitions)


def some_proposal(grid: TimeGrid) -> Proposal:
    mass = torch.rand(len(grid), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    return Proposal(grid, mass / mass.sum())


@every_schedule
@every_transitions
def test_cells_cover_time_and_their_scale_integrates_to_that_of_the_process(
    name: str, transitions: int | None
) -> None:
    grid = grid_of(name, transitions)
    assert float(grid.edges[0]) == 0 and float(grid.edges[-1]) == 1 and bool((grid.widths > 0).all())
    assert float(grid.positions.min()) >= 0 and float(grid.positions.max()) <= 1
    schedule = registered.scalar_schedule(name)
    first, last = schedule.endpoints()
    if transitions is None:
        expected = 0.5 * (last - first)
    else:
        with torch.no_grad():
            gammas = schedule(torch.arange(transitions + 1, dtype=torch.float64) / transitions).double()
        expected = 0.5 * float(torch.expm1(gammas.diff()).sum())
    assert float(grid.widths @ grid.scale) == pytest.approx(expected, rel=1e-5)


@every_schedule
@every_transitions
def test_every_proposal_is_unbiased_for_every_function_that_is_constant_on_cells(
    name: str, transitions: int | None
) -> None:
    """The mean of ``weight * g`` over evenly spaced uniforms, whose error is at most a cell's at each edge."""
    grid = grid_of(name, transitions)
    values = torch.randn(len(grid), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniforms = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    _, cell, weight = some_proposal(grid).draw(uniforms)
    error = (weight * values[cell]).mean() - grid.widths @ values
    assert abs(float(error)) < 1e-5 * float((weight * values[cell]).abs().max()) * len(grid) ** 0.5


@every_schedule
@every_transitions
def test_a_time_in_float32_is_in_its_cell_and_in_its_transition(name: str, transitions: int | None) -> None:
    grid = grid_of(name, transitions)
    uniforms = torch.rand(5000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t, cell, _ = some_proposal(grid).draw(uniforms)
    assert float(t.min()) >= 0 and float(t.float().max()) <= 1
    if transitions is not None:
        s, end = discretise(t.float().double(), transitions)
        assert bool((s >= grid.edges[cell] - 1e-12).all()) and bool((end <= grid.edges[cell + 1] + 1e-12).all())
    else:
        inside = (t >= grid.edges[cell] - 1e-12) & (t <= grid.edges[cell + 1] + 1e-12)
        assert bool(inside.all())


@every_transitions
def test_a_defensive_proposal_bounds_every_weight(transitions: int | None) -> None:
    """A pilot that saw nothing at all but at one cell: no weight is above that of the schedule's own over 0.1."""
    grid = grid_of("cosine", transitions)
    cell = torch.zeros(300, dtype=torch.long)
    proposal = fit_proposal(grid, cell, torch.ones(300, dtype=torch.float64), defensive=0.1)
    assert float(proposal.probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert float((proposal.probabilities / Proposal.even(grid).probabilities).min()) >= 0.1 * (1 - 1e-12)
    with pytest.raises(ValueError, match="defensive share is 0"):
        fit_proposal(grid, cell, torch.ones(300, dtype=torch.float64), defensive=0.0)


def test_the_proposal_follows_the_root_mean_square_of_the_integrand() -> None:
    grid = TimeGrid.of(registered.process(LinearSchedule()), None)
    cell = torch.arange(len(grid)).repeat(20)
    position = grid.positions[cell]
    signs = torch.where(torch.rand(len(cell), generator=torch.Generator().manual_seed(3)) < 0.5, -1.0, 1.0)
    found = fit_proposal(grid, cell, grid.scale[cell] * (0.2 + position) * signs, defensive=1e-9).probabilities
    expected = (0.2 + grid.positions) / (0.2 + grid.positions).sum()
    inner = slice(40, -40)  # kernels are cut at the ends
    torch.testing.assert_close(found[inner], expected[inner], rtol=0.05, atol=0)
    assert float(root_mean_square(torch.tensor([0.5]), position, torch.ones(len(cell)))) == pytest.approx(1)


def test_under_every_shape_of_schedule_the_proposal_in_gamma_is_one() -> None:
    """The same integrand in gamma: the same probabilities of the same cells of gamma."""
    found = []
    for schedule in (LinearSchedule(-8.0, 4.0), CosineSchedule(-8.0, 4.0)):
        grid = TimeGrid.of(registered.process(schedule), None)
        cell = torch.arange(len(grid))
        found.append(fit_proposal(grid, cell, grid.scale * torch.exp(-3 * grid.positions)).probabilities)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("data", "per_datum"), [(1, 1), (7, 1), (1, 5), (6, 4)])
def test_times_are_stratified_over_data_and_over_each_datums_own(data: int, per_datum: int) -> None:
    generator = torch.Generator().manual_seed(4)
    orders = torch.stack([torch.randperm(data, generator=generator) for _ in range(per_datum)])
    times = times_of_data(data, per_datum, torch.rand(per_datum, generator=generator), orders)
    assert times.shape == (data, per_datum) and times.dtype == torch.float64
    assert float(times.min()) >= 0 and float(times.max()) < 1
    assert bool(((times * per_datum).floor() == torch.arange(per_datum)).all()), "one of each datum in each stratum"
    strata = (times * data * per_datum + 1e-9).floor().flatten().sort().values
    assert strata.tolist() == list(range(data * per_datum)), "one of all in each stratum"
