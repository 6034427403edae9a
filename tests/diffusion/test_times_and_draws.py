"""Times stratified over the global batch, and noise that belongs to its datum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import registered
from naming import naming
from vdm_hub.diffusion.draws import normal_noise, uniform_noise
from vdm_hub.diffusion.times import discretise, stratified_times, times_of_data

CPU = torch.device("cpu")
OFFSET = st.floats(0, 1, exclude_max=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), OFFSET)
def test_the_parts_of_all_processes_are_together_the_global_times(parts: list[int], offset: float) -> None:
    total = sum(parts)
    pieces = [stratified_times(size, offset, sum(parts[:i]), total) for i, size in enumerate(parts)]
    assert torch.equal(torch.cat(pieces), stratified_times(total, offset))


@given(st.integers(1, 300), OFFSET, st.integers(0, 300))
def test_a_time_is_its_formula_to_the_last_bit(total: int, offset: float, start: int) -> None:
    """``(u + i/N) mod 1`` by Python's float64; and rounded once to float32, below one."""
    exact = [(offset + i / total) % 1 for i in range(start, start + total)]
    double = stratified_times(total, offset, start, total, dtype=torch.float64)
    assert double.dtype == torch.float64 and double.tolist() == exact
    single = torch.tensor(exact).float()
    assert torch.equal(stratified_times(total, offset, start, total), torch.where(single == 1, 0.0, single))


@given(st.integers(1, 300), OFFSET)
def test_one_time_in_each_stratum(total: int, offset: float) -> None:
    times = stratified_times(total, offset).double().sort().values
    assert times.shape == (total,)
    within = times * total - torch.arange(total)
    rounding = 1e-6 * total
    if float(times[0]) == 0 and float(within[-1]) < 0.5 and total > 1:  # a time just below 1 was rounded to 0
        within = within[1:] + 1
    assert float(within.min()) >= -rounding and float(within.max()) <= 1 + rounding
    assert float(within.max() - within.min()) <= rounding


@given(st.integers(1, 5000), st.one_of(OFFSET, st.sampled_from([1 - 2.0**-26, 1 - 2.0**-53, 0.0])))
def test_times_are_in_the_half_open_interval(total: int, offset: float) -> None:
    times = stratified_times(total, offset)
    assert times.dtype == torch.float32
    assert float(times.min()) >= 0 and float(times.max()) < 1


def test_a_tensor_is_as_good_an_offset() -> None:
    assert torch.equal(stratified_times(7, torch.tensor(0.3, dtype=torch.float64)), stratified_times(7, 0.3))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_times_of_data_are_their_formula(data: int, per_datum: int, seed: int) -> None:
    """``(j + (o_j + pi_j(n)/N) mod 1) / k`` for datum n and stratum j, by Python's float64."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.rand(per_datum, generator=generator, dtype=torch.float64)
    orders = torch.stack([torch.randperm(data, generator=generator) for _ in range(per_datum)])
    times = times_of_data(data, per_datum, offsets, orders)
    assert times.dtype == torch.float64
    assert times.tolist() == [
        [
            (j + (o + int(order[n]) / data) % 1) / per_datum
            for j, (o, order) in enumerate(zip(offsets.tolist(), orders, strict=True))
        ]
        for n in range(data)
    ]


@given(st.floats(0, 1), st.integers(1, 2000))
@example(1.0, 7)
def test_discretise_finds_the_transition_that_holds_the_time(time: float, transitions: int) -> None:
    s, t = discretise(torch.tensor([time], dtype=torch.float64), transitions)
    assert 0 <= float(s) < float(t) <= 1
    assert float(t - s) == pytest.approx(1 / transitions, rel=1e-9)
    assert float(s) - 1e-12 <= time <= float(t) + 1e-12
    index = float(t) * transitions
    assert index == pytest.approx(round(index), abs=1e-9)


@pytest.mark.parametrize("transitions", [1, 3, 10, 1000])
def test_a_stratified_batch_takes_each_transition_equally_often(transitions: int) -> None:
    _, t = discretise(stratified_times(2 * transitions, 0.25 / transitions), transitions)
    assert torch.bincount((t * transitions).round().long()).tolist() == [0] + [2] * transitions


@pytest.mark.parametrize("draw", [normal_noise, uniform_noise])
def test_each_datum_has_the_noise_of_its_own_generator_wherever_it_stands(draw) -> None:  # type: ignore[no-untyped-def]
    def generators(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    whole = draw((4, 3, 5), generators([3, 1, 4, 1]), CPU)
    shuffled = draw((4, 3, 5), generators([1, 4, 1, 3]), CPU)
    assert torch.equal(whole[[1, 2, 3, 0]], shuffled)
    assert torch.equal(draw((1, 3, 5), generators([4]), CPU)[0], whole[2])
    assert torch.equal(draw((1, 3, 5), torch.Generator().manual_seed(4), CPU)[0], whole[2])
    assert not torch.equal(whole[0], whole[1])


def test_a_process_draws_each_datums_noise_from_its_own_generator() -> None:
    process = registered.process(registered.schedule("linear"))
    pair = process.draw_noise((2, 3, 4, 4), [torch.Generator().manual_seed(seed) for seed in (8, 9)], CPU)
    alone = process.draw_noise((1, 3, 4, 4), [torch.Generator().manual_seed(9)], CPU)
    assert pair.keys() == alone.keys() and pair
    for name, noise in pair.items():
        assert torch.equal(noise[1:], alone[name])
    assert not torch.equal(pair["marginal"], pair["reconstruction"])


def test_a_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match=naming(2, 3)):
        normal_noise((3, 2), [torch.Generator(), torch.Generator()], CPU)


def test_dtype_and_range() -> None:
    assert normal_noise((2,), None, CPU, torch.float64).dtype == torch.float64
    uniform = uniform_noise((10_000,), torch.Generator().manual_seed(0), CPU)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
