"""Cells of time and proposals over them: exact sums instead of draws, so tolerances are those of rounding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import registered
from exact_denoisers import PerPixelSchedule
from naming import naming
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.noise_schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from vdm_hub.diffusion.times import discretise, times_of_data
from vdm_hub.likelihood.proposals import Proposal, fit_proposal, root_mean_square, smoothed_mean
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


def per_pixel(transitions: int | None) -> TimeGrid:
    schedule = PerPixelSchedule(-8.0, 4.0, tilt=torch.zeros(2), bump=torch.zeros(2))
    return TimeGrid.of(registered.process(schedule, conditioning=AffineConditioning(-8.0, 4.0)), transitions)


@pytest.mark.parametrize(("transitions", "cells"), [(None, 512), (5, 5), (1000, 512), (512, 512)])
def test_without_a_scalar_gamma_cells_and_the_even_proposal_are_uniform_in_time(
    transitions: int | None, cells: int
) -> None:
    grid = per_pixel(transitions)
    assert len(grid) == cells and grid.gammas is None and grid.transitions == transitions
    assert grid.scale.tolist() == [1.0] * cells and grid.scale.dtype == grid.edges.dtype == torch.float64
    torch.testing.assert_close(grid.positions, (grid.edges[:-1] + grid.edges[1:]) / 2)
    assert torch.equal(Proposal.even(grid).probabilities, grid.widths)
    assert float((grid.widths - 1 / cells).abs().max()) <= (0 if transitions is None else 1 / transitions)


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(-8.0, 4.0), CosineSchedule(-8.0, 4.0)], ids=lambda s: type(s).__name__
)
def test_cells_of_continuous_time_are_equal_in_log_snr(schedule: NoiseSchedule) -> None:
    """And half of the even proposal is, the other half the loss of data of variance one: sigmoid(-gamma) in gamma."""
    grid = TimeGrid.of(registered.process(schedule), None)
    edges = torch.linspace(-8, 4, 513, dtype=torch.float64)
    torch.testing.assert_close(schedule(grid.edges), edges, rtol=0, atol=1e-5)
    torch.testing.assert_close(grid.gammas, (edges[1:] + edges[:-1]) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(grid.positions, torch.linspace(0, 1, 512, dtype=torch.float64))
    torch.testing.assert_close(grid.mass, torch.full((512,), 0.5 * 12 / 512, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(grid.spans / grid.spans.sum(), torch.full((512,), 1 / 512).double(), rtol=1e-5, atol=0)
    lost = F.softplus(torch.tensor(8.0)) - F.softplus(-edges[1:])
    expected = 0.5 * torch.linspace(0, 1, 513, dtype=torch.float64)[1:] + 0.5 * lost / lost[-1]
    torch.testing.assert_close(Proposal.even(grid).probabilities.cumsum(0), expected, rtol=0, atol=1e-4)


class JumpsAtTheEnd(NoiseSchedule):
    """From -2 to 4 in the last 1e-13 of time."""

    def forward(self, t: Tensor) -> Tensor:
        return torch.where(1 - t < 1e-13, 4.0, -8 + 6 * t)

    def to_config(self) -> dict[str, Any]:
        return {}


def test_cells_that_a_jump_leaves_without_width_are_left_out() -> None:
    grid = TimeGrid.of(registered.process(JumpsAtTheEnd(), conditioning=AffineConditioning(-8.0, 4.0)), None)
    assert grid.edges[[0, -1]].tolist() == [0, 1] and float(grid.widths.min()) > 1e-6
    assert 256 <= len(grid) <= 257 and grid.gammas is not None and len(grid.gammas) == len(grid)


@pytest.mark.parametrize(("transitions", "cells"), [(1, 512), (5, 512), (5, 2), (1000, 7), (6, 6)])
def test_cells_hold_whole_transitions_and_the_mean_of_their_scale(transitions: int, cells: int) -> None:
    schedule = CosineSchedule(-8.0, 4.0)
    grid = TimeGrid.of(registered.process(schedule), transitions, cells)
    bounds = (grid.edges * transitions).round().long()
    torch.testing.assert_close(grid.edges, bounds.double() / transitions, rtol=1e-12, atol=0)
    assert len(grid) == min(cells, transitions) and len(set(bounds.diff().tolist())) <= 2
    assert int(bounds.diff().max() - bounds.diff().min()) <= 1 and bounds[[0, -1]].tolist() == [0, transitions]
    gammas = schedule(torch.arange(transitions + 1, dtype=torch.float64) / transitions).double()
    steps = 0.5 * transitions * torch.expm1(gammas.diff())
    for i, (first, last) in enumerate(pairwise(bounds.tolist())):
        assert float(grid.scale[i]) == pytest.approx(float(steps[first:last].mean()), rel=1e-9)
        assert grid.gammas is not None and float(grid.gammas[i]) == float(gammas[last])
    if len(grid) > 1 and grid.gammas is not None:
        ends = grid.gammas[[0, -1]]
        torch.testing.assert_close(ends[0] + grid.positions * ends.diff(), grid.gammas)
    if transitions <= cells:
        torch.testing.assert_close(grid.spans / grid.spans.sum(), gammas.diff() / gammas.diff().sum())


@pytest.mark.parametrize(("transitions", "cells"), [(None, 4), (4, 4), (1000, 4), (49, 49)])  # 1/49 * 49 is below 1
def test_a_fraction_of_a_cell_is_a_time_there_or_the_middle_of_its_step(transitions: int | None, cells: int) -> None:
    grid = TimeGrid.of(registered.process(CosineSchedule(-8.0, 4.0)), transitions, cells)
    half = 0.0 if transitions is None else 0.5 / transitions

    def times(fraction: float) -> Tensor:
        return grid.time_in(torch.arange(cells), torch.full((cells,), fraction, dtype=torch.float64))

    torch.testing.assert_close(times(0.0), grid.edges[:-1] + half, rtol=0, atol=1e-12)
    torch.testing.assert_close(times(1.0), grid.edges[1:] - half, rtol=0, atol=1e-12)
    third = times(1 / 3)
    torch.testing.assert_close(third, grid.edges[:-1] + grid.widths / 3, rtol=0, atol=half + 1e-12)
    if transitions is not None:
        torch.testing.assert_close((third * transitions) % 1, torch.full((cells,), 0.5).double(), rtol=0, atol=1e-9)


def test_a_draw_is_the_inverse_of_the_distribution_function_of_which_ratios_alone_count() -> None:
    grid = TimeGrid.of(registered.process(CosineSchedule(-8.0, 4.0)), None, cells=6)
    some = some_proposal(grid)
    uniforms = torch.rand(1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t, cell, weight = some.draw(uniforms)
    below = F.pad(some.probabilities.cumsum(0), (1, 0))
    torch.testing.assert_close(torch.from_numpy(np.interp(t, grid.edges, below)), uniforms, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight, (grid.widths / some.probabilities)[cell])
    for one, other in zip(Proposal(grid, 4 * some.probabilities).draw(uniforms), (t, cell, weight), strict=True):
        assert torch.equal(one, other)


def test_a_uniform_on_an_edge_is_in_the_cell_that_begins_there_and_none_is_in_an_empty_cell() -> None:
    grid = TimeGrid.of(registered.process(LinearSchedule()), 3)
    proposal = Proposal(grid, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    t, cell, weight = proposal.draw(
        torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    )  # rounding makes a 1
    assert cell.tolist() == [0, 0, 2, 2, 2]
    torch.testing.assert_close(t, (cell.double() + 0.5) / 3)
    torch.testing.assert_close(weight, torch.full((5,), 2 / 3).double())


def test_a_proposal_depends_on_the_integrand_up_to_a_factor_and_is_even_where_it_is_zero() -> None:
    grid = TimeGrid.of(registered.process(LinearSchedule()), None)
    cell = torch.arange(0, len(grid), 7)
    values = grid.scale[cell] * (0.1 + grid.positions[cell])
    first, second = (fit_proposal(grid, cell, factor * values).probabilities for factor in (1.0, 1e-9))
    torch.testing.assert_close(second, first)
    assert torch.equal(fit_proposal(grid, cell, 0 * values).probabilities, Proposal.even(grid).probabilities)


def test_a_smoothed_mean_is_mirrored_with_its_values_and_of_a_constant_is_the_constant() -> None:
    generator = torch.Generator().manual_seed(6)
    positions, values, at = (torch.rand(300, generator=generator, dtype=torch.float64) for _ in range(3))
    at[:2] = torch.tensor([0.0, 1.0])
    there = smoothed_mean(at, positions, values)
    torch.testing.assert_close(smoothed_mean(1 - at, 1 - positions, values), there)
    assert float(there.std()) > 0.02
    near = 0.3 + 0.2 * (at - 0.5)
    few = smoothed_mean(near, torch.tensor([0.3, 0.31]), torch.tensor([2.5, 2.5]))
    torch.testing.assert_close(few, torch.full((300,), 2.5, dtype=torch.float64))


@every_transitions
def test_a_defensive_proposal_bounds_every_weight(transitions: int | None) -> None:
    """A pilot that saw nothing at all but at one cell: no weight is above that of the schedule's own over 0.1."""
    grid = grid_of("cosine", transitions)
    cell = torch.zeros(300, dtype=torch.long)
    proposal = fit_proposal(grid, cell, torch.ones(300, dtype=torch.float64), defensive=0.1)
    assert float(proposal.probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert float((proposal.probabilities / Proposal.even(grid).probabilities).min()) >= 0.1 * (1 - 1e-12)
    with pytest.raises(ValueError, match=naming("defensive", 0)):
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
