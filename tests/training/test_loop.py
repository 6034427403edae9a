"""The training loop in one process: what it learns, keeps, resumes, refuses and shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import LEARNED, UNET, contents, start, train_here, weights
from vdm_hub import VDMPipeline
from vdm_hub.errors import CheckpointError, ConfigurationError, NonFiniteLossError, VDMHubError
from vdm_hub.training.parts.setup import build_pipeline
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

ACCUMULATED = {"noise_schedule": LEARNED, "gradient_accumulation_steps": 2, "train_batch_size": 8}
VARIANTS = {
    "plain": {},
    "no average": {"use_ema": False},
    "accumulated, learned": ACCUMULATED,
    "drawing": {"unet": UNET | {"dropout": 0.2}, "random_flip": True},
    "streamed": {"streaming": True, "shuffle_buffer_size": 50},
}


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    """The very bytes of a checkpoint's weights, averages, optimiser and schedule."""
    files = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    state = load_checkpoint(checkpoint).state
    return files | {"step": json.dumps(state["step"]).encode()}


# ---- it learns ------------------------------------------------------------------------------------------------------


def test_the_loss_goes_down_and_all_terms_are_seen(tmp_path: Path) -> None:
    run = start(tmp_path / "run", max_train_steps=60, train_batch_size=64, learning_rate=3e-3, lr_scheduler="constant")
    seen = [run.optimise(batches) for batches in run.batches()]
    assert run.step == len(seen) == 60
    assert {tuple(terms) for terms in seen} == {("reconstruction", "prior", "diffusion")}
    losses = torch.stack([sum(terms.values(), torch.zeros(())) for terms in seen])
    first, last = losses[:5].mean(), losses[-10:].mean()
    assert last < 0.75 * first, (float(first), float(last))


def test_one_seed_fixes_everything(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fields: dict[str, Any] = {"seed": seed, "num_sample_images": 4, "evaluation_replicates": 2}
        report = train_here(tmp_path / name, **fields)
        assert report is not None
        samples = (tmp_path / name / "samples.png").read_bytes()
        (last,) = checkpoints(tmp_path / name / "checkpoints")
        found.append((tensors_of(last), samples, report.bits_per_dim))
    assert found[0] == found[1]
    assert all(ours != theirs for ours, theirs in zip(found[0], found[2], strict=True))


def test_the_network_of_diffusers_works_in_its_place(tmp_path: Path) -> None:
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    unet = {"_class_name": "UNet2DModel", "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    fields: dict[str, Any] = {"unet": unet | blocks, "evaluation_replicates": 1, "max_train_steps": 2}
    report = train_here(tmp_path / "run", **fields)
    assert report is not None
    assert report.num_images == 360
    pipeline = VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline.unet).__name__ == "UNet2DModel"


# ---- every draw is a function of the seed, the step and the place in the global batch -------------------------------


def test_accumulation_has_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    run = start(tmp_path / "run", gradient_accumulation_steps=2, train_batch_size=8, max_grad_norm=1e9)
    batches = next(run.batches())
    times = torch.cat([run._times(part) for part in (0, 1)])
    assert (times.sort().values.double().diff() - 1 / 16).abs().max() < 1e-6, "stratified over both"
    noises = [run._noise(batch, part) for part, batch in enumerate(batches)]
    assert not torch.equal(noises[0]["marginal"], noises[1]["marginal"])
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    noise = {name: torch.cat([one[name] for one in noises]) for name in noises[0]}
    run.model(whole, times, noise).loss.backward()
    expected = [parameter.grad.clone() for parameter in run.model.parameters()]
    run.model.zero_grad()
    accumulated: list[torch.Tensor] = []
    step = run._stepping.step

    def look_and_step() -> None:
        accumulated.extend(parameter.grad.clone() for parameter in run.model.parameters())
        step()

    run._stepping.step = look_and_step
    run.optimise(batches)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for ours, theirs in zip(accumulated, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_draws_differ_from_step_to_step_and_do_not_depend_on_the_past(tmp_path: Path) -> None:
    run, later = start(tmp_path / "a"), start(tmp_path / "b")
    batches = run.source.batch(0)
    first = (run._times(0), run._noise(batches, 0)["marginal"])
    run.optimise([batches])
    second = (run._times(0), run._noise(batches, 0)["marginal"])
    later.step = 1
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    torch.manual_seed(12345)
    assert torch.equal(later._times(0), second[0])
    assert torch.equal(later._noise(batches, 0)["marginal"], second[1])


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(variant: str, tmp_path: Path) -> None:
    fields = VARIANTS[variant] | {"checkpointing_steps": 4, "max_train_steps": 7}
    train_here(tmp_path / "a", **fields)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000007")
    shutil.rmtree(tmp_path / "b" / "pipeline")
    torch.manual_seed(999)  # nothing may hang on the state of the process
    train_here(tmp_path / "b", **fields, resume_from_checkpoint="latest")
    last = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in "ab"]
    assert [path.name for path in last] == ["step-00000007"] * 2
    assert tensors_of(last[0]) == tensors_of(last[1])
    assert contents(tmp_path / "a" / "pipeline") == contents(tmp_path / "b" / "pipeline")


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    train_here(tmp_path / "run")
    before = contents(tmp_path / "run")
    train_here(tmp_path / "run", resume_from_checkpoint="latest")
    after = contents(tmp_path / "run")
    assert {name for name in before if before[name] != after.get(name)} == {"recipe.yaml"}
    assert before.keys() == after.keys()


def test_a_run_resumes_with_a_lower_learning_rate_which_then_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = {"max_train_steps": 4, "lr_scheduler": "constant_with_warmup", "checkpointing_steps": 2}
    train_here(tmp_path / "run", **fields)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    run = start(tmp_path / "run", **fields | {"learning_rate": 1e-5}, resume_from_checkpoint="latest")
    capsys.readouterr()
    run.resume()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed from"))
    assert line.endswith("step-00000002; learning_rate was 0.002 and is 1e-05")
    assert run.step == 2
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-5]
    run.optimise(next(run.batches()))
    assert run.lr_scheduler.get_last_lr() == [1e-5]


def test_the_limit_of_checkpoints_is_kept(tmp_path: Path) -> None:
    train_here(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2)
    names = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000005", "step-00000006"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_here(folder, checkpointing_steps=3)
    return folder


def refused(output: Path, error: type[VDMHubError], words: str, **fields: Any) -> None:
    """The run is refused in one paragraph, and the folder around it stays as it was to the byte."""
    before = contents(output.parent)
    with pytest.raises(error, match=words) as caught:
        train_here(output, **fields)
    assert "\n" not in str(caught.value)
    assert contents(output.parent) == before


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(damage: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "objective.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    if damage == "missing":
        file.unlink()
    refused(
        tmp_path / "run",
        CheckpointError,
        "damaged: objective.safetensors.*resume from .*step-00000003 instead",
        resume_from_checkpoint=str(file.parent),
        report_to="tensorboard",
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type was 'epsilon' and is 'v_prediction'"),
        ({"unet": {"block_out_channels": [12], "norm_num_groups": 4}}, "unet was"),
        ({"noise_schedule": "linear"}, "noise_schedule was"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ],
)
def test_another_recipe_is_refused_and_nothing_changes(
    fields: dict[str, Any], words: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    refused(tmp_path / "run", CheckpointError, words, **fields, resume_from_checkpoint="latest")


def test_a_foreign_checkpoint_is_refused_and_nothing_changes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    foreign = tmp_path / "run" / "checkpoints" / "step-00000099"
    foreign.mkdir()
    save_file({"weight": torch.zeros(3)}, foreign / "model.safetensors")
    words = "not a checkpoint of vdm_hub"
    refused(tmp_path / "run", CheckpointError, words, resume_from_checkpoint=str(foreign))
    refused(
        tmp_path / "run",
        CheckpointError,
        "no checkpoint at",
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-5"),
    )


# ---- the output folder ----------------------------------------------------------------------------------------------


def test_a_folder_with_another_run_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    refused(tmp_path / "run", CheckpointError, "already holds a run.*--resume_from_checkpoint latest")
    elsewhere = str(trained / "checkpoints" / "step-00000003")
    refused(tmp_path / "run", CheckpointError, "already holds a run", resume_from_checkpoint=elsewhere)


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    refused(tmp_path / "thesis", CheckpointError, "is not empty")
    refused(tmp_path / "thesis", CheckpointError, "is not empty", resume_from_checkpoint="latest")


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", CheckpointError, "is a file")


def test_a_run_may_begin_from_the_checkpoint_of_another_folder(trained: Path, tmp_path: Path) -> None:
    before = contents(trained)
    train_here(tmp_path / "new", resume_from_checkpoint=str(trained / "checkpoints" / "step-00000003"))
    ours, theirs = (checkpoints(folder / "checkpoints")[-1] for folder in (tmp_path / "new", trained))
    assert tensors_of(ours) == tensors_of(theirs)
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"unet": {"block_channels": [8]}}, "did you mean 'block_out_channels'"),
        ({"unet": {"block_out_channels": [7], "norm_num_groups": 4}}, "norm_num_groups|divis"),
        ({"unet": {"in_channels": 3}}, "in_channels=3, but the images are 1x8x8"),
        ({"noise_schedule": {"name": "tabulated", "config": {"gammas": [-7.0, 2.0, 1.0, 5.0]}}}, "increas|monoton"),
        ({"image_column": "picture"}, "no column 'picture': it has image"),
        ({"train_batch_size": 5000}, "5000"),
        ({"mixed_precision": "fp16"}, "mixed_precision"),
        ({"report_to": "wandb,aim,clearml,swanlab"}, "not installed"),
    ],
)
def test_what_is_refused_leaves_no_folder_behind(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "bystander").write_text("")
    refused(tmp_path / "run", VDMHubError, words, **fields)


# ---- losses that are not finite -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_at_once(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.announce()
    run.optimise(next(run.batches()))
    run.save()
    (good,) = checkpoints(run.folder.checkpoints)
    before = contents(run.folder.path)
    with torch.no_grad():
        next(run.model.network.parameters()).fill_(torch.nan)
    poisoned = weights(run).clone()
    words = r"step 2 is not finite \(reconstruction [\d.]+, prior [\d.]+, diffusion nan"
    with pytest.raises(NonFiniteLossError, match=words) as caught:
        run.optimise(next(run.batches()))
    assert str(good) in str(caught.value)
    assert "learning_rate" in str(caught.value)
    assert torch.equal(weights(run).nan_to_num(9), poisoned.nan_to_num(9)), "no step was taken"
    assert contents(run.folder.path) == before
    assert all(bool(t.isfinite().all()) for t in load_checkpoint(good).tensors["objective"].values())


def test_a_run_that_diverges_keeps_its_good_checkpoints(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"checkpointing_steps": 1, "lr_warmup_steps": 0, "max_train_steps": 20}
    with pytest.raises(NonFiniteLossError, match="is not finite"):
        train_here(tmp_path / "run", **fields, learning_rate=1e30, lr_scheduler="constant")
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert kept
    assert not (tmp_path / "run" / "pipeline").exists()
    for path in kept:
        for name, tensor in load_checkpoint(path).tensors["objective"].items():
            assert bool(tensor.isfinite().all()), (path, name)


# ---- what is published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_published_weights_are_the_averaged_ones(use_ema: bool, tmp_path: Path) -> None:
    train_here(tmp_path / "run", use_ema=use_ema)
    (last,) = checkpoints(tmp_path / "run" / "checkpoints")
    groups = load_checkpoint(last).tensors
    published = load_file(tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert ("ema" in groups) == use_ema
    trained = groups["objective"] | groups.get("ema", {})
    for name, tensor in published.items():
        assert torch.equal(tensor, trained[f"network.{name}"]), name
    raw = {name: groups["objective"][f"network.{name}"] for name in published}
    assert any(not torch.equal(published[name], raw[name]) for name in published) == use_ema


@pytest.mark.parametrize("name", ["learned_linear", "learned_monotone"])
@pytest.mark.parametrize("transitions", [None, 10])
def test_a_learned_schedule_is_trained_undecayed_and_published_baked(
    name: str, transitions: int | None, tmp_path: Path
) -> None:
    schedule = LEARNED if name == "learned_monotone" else {"name": name, "config": {"gamma_min": -7.0}}
    fields: dict[str, Any] = {"noise_schedule": schedule, "transitions": transitions, "max_train_steps": 3}
    run = start(tmp_path / "run", **fields, lr_warmup_steps=0, adam_weight_decay=0.5)
    learned = dict(run.model.process.named_parameters())
    groups = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {groups[id(parameter)] for parameter in learned.values()} == {0.0}
    assert {groups[id(parameter)] for parameter in run.model.network.parameters()} == {0.5}
    before = {key: value.detach().clone() for key, value in learned.items()}
    for batches in run.batches():
        run.optimise(batches)
    for key, value in learned.items():
        assert not torch.equal(value, before[key]), f"no gradient reached {key}"
    pipeline = build_pipeline(run.model.eval())
    config = pipeline.scheduler.config["noise_schedule"]
    assert config["name"] == "tabulated"
    ends = run.model.process.schedule(torch.tensor([0.0, 1.0])).detach()
    assert config["config"]["gammas"][0] == float(ends[0])
    assert config["config"]["gammas"][-1] == float(ends[1])
    assert torch.equal(pipeline.process.schedule(torch.tensor([0.0, 1.0])), ends)


@pytest.mark.slow
def test_bfloat16_trains_near_float32_and_publishes_float32(tmp_path: Path) -> None:
    terms: dict[str, list[dict[str, torch.Tensor]]] = {}
    for precision in ("no", "bf16"):
        run = start(tmp_path / precision, mixed_precision=precision, train_batch_size=64)
        terms[precision] = [run.optimise(batches) for batches in run.batches()]
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    for low, full in zip(terms["bf16"], terms["no"], strict=True):
        for name in ("reconstruction", "prior"):
            assert torch.equal(low[name], full[name]), "these never leave float32"
        assert low["diffusion"].dtype == torch.float32
        torch.testing.assert_close(low["diffusion"], full["diffusion"], rtol=1e-2, atol=0)
    assert any(not torch.equal(low["diffusion"], full["diffusion"]) for low, full in zip(*terms.values(), strict=True))
    report = train_here(tmp_path / "whole", mixed_precision="bf16", evaluation_replicates=1)
    reference = train_here(tmp_path / "reference", evaluation_replicates=1)
    assert report is not None
    assert reference is not None
    assert report.bits_per_dim == pytest.approx(reference.bits_per_dim, rel=2e-2)


# ---- what is seen while it runs -------------------------------------------------------------------------------------


def test_samples_and_held_out_bits_are_shown_while_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = {"validation_size": 40, "validation_steps": 2, "sample_steps": 3, "num_sample_images": 4}
    train_here(tmp_path / "run", **fields, report_to="tensorboard", logging_steps=2, validation_images=32)
    grids = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert grids == ["step-00000003.png", "step-00000006.png"]
    for name in grids:
        assert Image.open(tmp_path / "run" / "samples" / name).mode == "L"
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("held-out") == 3
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "vdm_hub"))
    events.Reload()
    steps = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    named = ("bits_per_dim", "reconstruction", "prior", "diffusion")
    assert {f"{part}/{name}" for part in ("train", "validation") for name in named} | {"learning_rate"} <= set(steps)
    assert steps["train/bits_per_dim"] == steps["validation/bits_per_dim"] == [2, 4, 6]
    assert [event.step for event in events.Images("samples")] == [3, 6, 6]  # the last one of the published weights


def test_looking_while_training_changes_nothing(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"validation_size": 40}
    looking: dict[str, Any] = {"validation_steps": 2, "sample_steps": 3, "num_sample_images": 4, "logging_steps": 1}
    for name, more in (("blind", {}), ("seeing", looking)):
        train_here(tmp_path / name, **fields | more)
    blind, seeing = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("blind", "seeing"))
    assert tensors_of(blind) == tensors_of(seeing)


def test_without_trackers_nothing_is_logged(tmp_path: Path) -> None:
    train_here(tmp_path / "run", report_to="none", max_train_steps=1)
    assert not (tmp_path / "run" / "logs").exists()


def test_epochs_count_the_global_batch(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_train_steps": None, "num_train_epochs": 3, "max_train_samples": 70}
    assert start(tmp_path / "a", **fields).total_steps == 3 * (70 // 16)
    assert start(tmp_path / "b", **fields, gradient_accumulation_steps=2).total_steps == 3 * (70 // 16) // 2
    with pytest.raises(ConfigurationError, match="max_train_steps"):
        start(tmp_path / "c", **fields, streaming=True)


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path: Path) -> None:
    diverging = {"learning_rate": 1e38, "lr_scheduler": "constant", "max_grad_norm": 1e30, "checkpointing_steps": 1}
    with pytest.raises(NonFiniteLossError, match="weights"):
        train_here(tmp_path / "run", max_train_steps=1, **diverging)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not (tmp_path / "run" / "pipeline").exists()


def test_a_later_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_here(output, max_train_steps=4, checkpointing_steps=2)
    before = contents(output)
    with pytest.raises(CheckpointError, match="later"):
        train_here(output, max_train_steps=4, resume_from_checkpoint=str(output / "checkpoints" / "step-00000002"))
    assert contents(output) == before


def test_latest_does_not_take_over_a_folder_with_another_recipe(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "recipe.yaml").write_text("my notes")
    with pytest.raises(CheckpointError, match="overwritten"):
        train_here(output, max_train_steps=1, resume_from_checkpoint="latest")
    assert (output / "recipe.yaml").read_text() == "my notes"
