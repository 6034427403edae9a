"""What a step draws, takes and returns, in one process: as a function of the seed, the step and the place alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from naming import naming
from runs import LEARNED, UNET, as_process, configuration, forget_accelerator, start, weights
from vdm_hub.data.loading import load_data
from vdm_hub.errors import NonFiniteLossError
from vdm_hub.objectives.variational_bound import Bound
from vdm_hub.training.loop import TrainingRun, build_accelerator
from vdm_hub.training.state.outputs import OutputFolder

SEED, SIZE = 7, 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    folder = tmp_path_factory.mktemp("run") / "run"
    return start(folder, seed=SEED, train_batch_size=SIZE, gradient_accumulation_steps=3, noise_schedule=LEARNED)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    kept = [(state, dict(state._shared_state)) for state in (AcceleratorState, GradientState, PartialState)]
    yield
    for state, values in kept:
        state._shared_state.update(values)


@pytest.mark.parametrize("step", [0, 5])
def test_times_are_one_grid_over_all_micro_batches_at_an_offset_of_the_seed_and_the_step(
    run: TrainingRun, step: int
) -> None:
    run.step = step
    total = 3 * SIZE
    u = np.random.default_rng([SEED, step]).random()
    expected = (u + torch.arange(total, dtype=torch.float64) / total) % 1
    times = torch.cat([run._times(part) for part in range(3)])
    torch.testing.assert_close(times.double(), expected, rtol=0, atol=1e-7)


def test_all_processes_together_draw_what_one_with_as_many_micro_batches_does(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.step = 2
    batch = next(run.source.batches())
    alone = [(run._times(part), run._noise(batch, part), torch.rand(1)) for part in range(3)]
    monkeypatch.setattr(run, "training", replace(run.training, gradient_accumulation_steps=1))
    for index, (times, noise, dropped) in enumerate(alone):
        as_process(index, 3)
        assert torch.equal(run._times(0), times)
        again = run._noise(batch, 0)
        assert torch.equal(torch.rand(1), dropped)
        assert all(torch.equal(again[name], noise[name]) for name in noise)
    as_process(1, 2)
    assert [run._place(part) for part in range(3)] == [1, 3, 5]


def test_each_micro_batch_of_each_step_has_noise_and_dropout_of_its_own(run: TrainingRun) -> None:
    """By their seeds, which numpy's SeedSequence spreads: the first word for the noise, the second for dropout."""
    batch = next(run.source.batches())
    for run.step in (0, 3):
        for part in range(3):
            first, second = np.random.SeedSequence([SEED, run.step, part]).generate_state(2, np.uint64) >> np.uint64(1)
            noise = run._noise(batch, part)
            dropped = torch.rand(4)
            expected = run.model.draw_noise(batch, torch.Generator().manual_seed(int(first)))
            assert all(torch.equal(noise[name], expected[name]) for name in expected) and expected
            assert torch.equal(dropped, torch.rand(4, generator=torch.Generator().manual_seed(int(second))))


def test_a_step_returns_the_mean_terms_of_its_micro_batches_and_counts_one(run: TrainingRun) -> None:
    run.step = 0
    run.model.eval()
    batches = next(run.batches())
    assert len(batches) == 3
    with torch.no_grad():
        parts = [
            run.model(batch, run._times(part), run._noise(batch, part)).bits_per_dim()
            for part, batch in enumerate(batches)
        ]
    terms = run.optimise(batches)
    assert run.step == 1 and run.model.training and run.model.body.training
    for name, term in terms.items():
        expected = torch.cat([one[name] for one in parts]).mean()
        torch.testing.assert_close(term, expected, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None or not bool(parameter.grad.any()) for parameter in run.model.parameters())


@pytest.mark.parametrize("part", ["model", "body"])
def test_a_step_is_taken_in_training_mode(run: TrainingRun, part: str) -> None:
    (run.model if part == "model" else run.model.body).eval()
    run.optimise(next(run.batches()))
    assert run.model.training and run.model.body.training


def test_dropout_depends_on_the_step_and_not_on_what_was_drawn_before(tmp_path: Path) -> None:
    after = []
    for already in (0, 1):
        run = start(tmp_path / str(already), unet=UNET | {"dropout": 0.5}, lr_warmup_steps=0)
        torch.manual_seed(already)
        run.optimise(next(run.batches()))
        after.append(weights(run))
    assert torch.equal(*after)


def test_micro_batches_go_on_where_the_step_says(run: TrainingRun) -> None:
    run.step = 4
    source = run.source.batches(start_step=12)
    batches = run.batches()
    for _ in range(2):
        for batch in next(batches):
            expected = next(source)
            assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    run.step = run.total_steps - 1
    assert not run.is_last()
    batches = run.batches()
    next(batches)
    run.step = run.total_steps
    assert run.is_last() and next(batches, None) is None
    run.step = 0


def test_a_run_ends_when_its_patience_does(tmp_path: Path) -> None:
    run = start(tmp_path / "run", early_stopping_patience=1, validation_steps=1, validation_size=16)
    assert not run.is_last()
    run.early_stopping.look(3.0, 1)
    run.early_stopping.look(3.0, 2)
    assert run.is_last() and next(run.batches(), None) is None


def test_counts_are_those_of_the_whole_run(tmp_path: Path) -> None:
    run = start(tmp_path / "run", train_batch_size=SIZE, gradient_accumulation_steps=3)
    assert (run.total_steps, run.global_batch_size) == (6, 3 * SIZE)
    assert (run.step, run.seconds) == (0, 0.0)


def test_epochs_hold_whole_steps_and_the_batches_are_the_sources(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_train_steps": None, "num_train_epochs": 4, "gradient_accumulation_steps": 4}
    run = start(tmp_path / "run", **fields, train_batch_size=48, random_flip=True)
    images = len(run.data.train)
    assert run.total_steps == 4 * (images // 48 // 4) < 4 * (images // 48) // 4
    assert (run.source.seed, run.source.random_flip) == (run.training.seed, True)
    # At least 1,024 images are looked at, in whole batches of the order of the first epoch.
    looked = list(run._first_images())
    assert len(looked) == math.ceil(1024 / 48)
    exactly = start(tmp_path / "exactly", train_batch_size=64)
    assert len(list(exactly._first_images())) == 16
    assert torch.equal(looked[0]["levels"], start(tmp_path / "plain", train_batch_size=48).source.batch(0)["levels"])


def begun(output: Path, change: Callable[[Accelerator], None], **fields: Any) -> TrainingRun:
    """A run before its first step, of an accelerator to which something was done."""
    forget_accelerator()
    chosen, folder = configuration(output, **fields), OutputFolder(configuration(output, **fields))
    accelerator = build_accelerator(chosen, folder.path, folder.logs)
    change(accelerator)
    return TrainingRun(chosen, accelerator, load_data(chosen.data), folder)


def test_each_process_reads_its_own_part_of_a_batch_that_all_share(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_train_steps": None, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    run = begun(tmp_path / "run", lambda _: as_process(1, 3), **fields, scale_lr=True, lr_warmup_steps=0)
    assert (run.source.rank, run.source.world_size, run.global_batch_size) == (1, 3, 16 * 2 * 3)
    assert run.total_steps == 2 * (len(run.data.train) // (16 * 3) // 2)
    told = run.provenance.describe(0, 0.0)
    assert (told["processes"], told["global_batch_size"]) == (3, 16 * 2 * 3)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * 16 * 2 * 3)


@pytest.mark.filterwarnings("ignore:Seems like")  # torch's, of a step that is skipped
def test_a_gradient_that_overflows_a_scaler_skips_the_step_and_lowers_the_scale(tmp_path: Path) -> None:
    """As with fp16 on a GPU: at so high a scale the first gradients are infinite, and the loss is not."""

    def scale(accelerator: Accelerator) -> None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    run = begun(tmp_path / "run", scale, lr_warmup_steps=0)
    before = weights(run)
    run.optimise(next(run.batches()))
    assert torch.equal(weights(run), before) and run.step == 1
    assert run.accelerator.scaler.get_scale() == 2.0**126


def test_a_parameter_that_no_gradient_reaches_stays_and_the_others_are_trained(tmp_path: Path) -> None:
    run = start(tmp_path / "run", lr_warmup_steps=0, adam_weight_decay=0.5)
    still, *others = run.model.parameters()
    still.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in (still, *others)]
    run.optimise(next(run.batches()))
    moved = [not torch.equal(*pair) for pair in zip((still, *others), before, strict=True)]
    assert not moved[0] and any(moved)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_no_weight_follows_a_loss_or_a_gradient_that_is_not_finite(wrong: str, tmp_path: Path) -> None:
    run = start(tmp_path / "run", lr_warmup_steps=0)
    batches = run.batches()
    run.optimise(next(batches))
    before = weights(run)
    parameter = next(run.model.parameters())
    if wrong == "gradient":
        parameter.register_hook(lambda gradient: gradient * math.inf)
    else:

        def spoil(_model: Any, _arguments: Any, bound: Bound) -> None:
            bound.terms["diffusion"] = bound.terms["diffusion"] * math.nan

        run.model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLossError, match=naming("step 2")):
        run.optimise(next(batches))
    assert torch.equal(weights(run), before)
