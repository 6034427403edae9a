"""Every rung of the ladder goes through the same training: checkpoints, moving averages, samples, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from naming import naming
from runs import LAUNCH, python, recipe, start, train_here, weights
from vdm_hub import HVAEPipeline, MarkovianHVAE
from vdm_hub.commands.__main__ import main
from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

SMALL = {"latent_shapes": [[2, 4, 4], [4]], "depth": 2, "block_out_channels": [8], "norm_num_groups": 4}
HVAE: dict[str, Any] = {"model": "hvae", "hvae": SMALL, "unet": {}, "noise_schedule": "linear"}
STAGE = {"latent_shapes": [[2, 4, 4]], "block_out_channels": [8], "norm_num_groups": 4}
LATENT: dict[str, Any] = {"model": "latent_vdm", "first_stage": STAGE}
rungs = pytest.mark.parametrize("rung", [HVAE, LATENT], ids=["hvae", "latent_vdm"])


def test_a_hierarchy_trains_and_what_it_leaves_is_measured_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(tmp_path / "recipe", tmp_path / "run", **HVAE, evaluation_replicates=2, num_sample_images=4)
    done = python(*LAUNCH, "-m", "vdm_hub.train", made, "--validation_size", "50", "--validation_steps", "3")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} >= {
        *("checkpoints", "pipeline", "evaluation.json", "history.json", "run.json", "samples.png", "recipe.yaml"),
        "training_curve.png",
    }
    assert not (run / "schedule.png").exists()
    measured = json.loads((run / "evaluation.json").read_text())
    assert list(measured["terms"]) == ["reconstruction", "consistency_1", "prior"]
    assert measured["hierarchy"] == {"depth": 2}
    assert len(json.loads((run / "history.json").read_text())["validation"]["bits_per_dim"]) == 2
    words = ["evaluate", str(run / "pipeline"), "--dataset_name", "digits", "--replicates", "2", "--json"]
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["bits_per_dim"] == measured["bits_per_dim"]
    assert main([*words, "--method", "importance_weighted", "--draws", "3", "--max_images", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["importance_weights"]["over"] == "latents"
    assert main([*words[:-1], "--transitions", "3"]) == 2
    assert "a hierarchical VAE has its 2 latents" in capsys.readouterr().err
    assert main(["sample", str(run / "pipeline"), "--num_images", "3", "--output", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("rung", [HVAE, pytest.param(LATENT, marks=pytest.mark.slow)], ids=["hvae", "latent_vdm"])
def test_training_lowers_the_bound(rung: dict[str, Any], tmp_path: Path) -> None:
    fields = rung | {"evaluation_replicates": 4, "learning_rate": 5e-3, "lr_warmup_steps": 0}
    first = train_here(tmp_path / "first", **fields, max_train_steps=1)
    last = train_here(tmp_path / "last", **fields, max_train_steps=80)
    assert first is not None
    assert last is not None
    assert last.bits_per_dim < first.bits_per_dim - 0.5


@rungs
def test_a_resumed_run_ends_with_the_weights_of_the_undisturbed_one(rung: dict[str, Any], tmp_path: Path) -> None:
    train_here(tmp_path / "whole", **rung, checkpointing_steps=3)
    train_here(tmp_path / "parts", **rung, checkpointing_steps=3)
    (tmp_path / "parts" / "pipeline").rename(tmp_path / "aside")
    checkpoints(tmp_path / "parts" / "checkpoints")[-1].rename(tmp_path / "aside-too")
    train_here(tmp_path / "parts", **rung, checkpointing_steps=3, resume_from_checkpoint="latest")
    ends = [load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "parts")]
    for group, tensors in ends[0].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ends[1].tensors[group][name]), (group, name)


@rungs
def test_bfloat16_stays_in_the_networks(rung: dict[str, Any], tmp_path: Path) -> None:
    run = start(tmp_path / "run", **rung, mixed_precision="bf16")
    before = weights(run)
    terms = [run.optimise(batches) for batches in run.batches()]
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for one in terms for value in one.values())
    assert not torch.equal(before, weights(run))


def test_a_dry_run_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path / "run", **HVAE, dry_run=True)
    said = capsys.readouterr().out
    assert "MarkovianHVAE, " in said
    assert "nothing is learned" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (HVAE | {"hvae": SMALL | {"depth": 0}}, ("depth", 0)),
        (HVAE | {"hvae": SMALL | {"dept": 2}}, ("MarkovianHVAE", "dept", "depth")),
        (HVAE | {"hvae": SMALL | {"num_levels": 5}}, ("hvae", "num_levels", 5, 17)),
        (HVAE | {"hvae": SMALL | {"latent_shapes": [[2], [3], [4]]}}, ("latent_shapes", 3)),
        (HVAE | {"gradient_checkpointing": True}, ("MarkovianHVAE", "gradient checkpointing")),
        (HVAE | {"noise_schedule": "cosine"}, ("noise_schedule", "hvae")),
        (HVAE | {"transitions": 4}, ("transitions", "hvae")),
        (HVAE | {"unet": {"layers_per_block": 3}}, ("unet", "vdm", "latent_vdm")),
        ({"hvae": SMALL}, ("hvae", "vdm")),
        ({"model": "gan"}, ("model", "gan", "hvae", "latent_vdm", "vdm")),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], message: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        start(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["digits_vae", "digits_hvae"])
def test_the_recipes_build_their_pipelines(name: str, tmp_path: Path) -> None:
    configuration = parse_recipe([name, "--output_dir", str(tmp_path)])
    model = MarkovianHVAE(8, in_channels=1, num_levels=17, **configuration.model.hvae_config)
    assert HVAEPipeline(model).image_shape == (1, 8, 8)
