"""What was not saved by us, or was changed since, is refused by every door: one row of faults after the other."""

from __future__ import annotations

import json
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from hub.test_fuzz import built
from naming import naming
from tiny import quiet, sampled, tiny_pipeline, tiny_unet_2d
from vdm_hub import (
    AutoencoderKLFirstStage,
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    RegisteredModel,
    UNetVDMModel,
    VDMPipeline,
    VDMScheduler,
)
from vdm_hub.commands import main
from vdm_hub.errors import CheckpointError, ConfigurationError, VDMHubError

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS: Mapping[str, Any] = {
    "carried": VDMPipeline,
    "stock": VDMPipeline,
    "hvae": HVAEPipeline,
    "latent": LatentVDMPipeline,
}
PARTS: Mapping[str, Any] = {
    "scheduler": VDMScheduler,
    "unet": UNetVDMModel,
    "noise_schedule": RegisteredModel,
    "hvae": MarkovianHVAE,
    "first_stage": AutoencoderKLFirstStage,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    for kind in (*KINDS, "ddpm"):
        built(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in (*KINDS, "ddpm")}


def doors(kind: str, path: str) -> list[Callable[[Path], Any]]:
    """Every way to load the file: the pipeline's, diffusers' own, and the component's."""
    found: list[Callable[[Path], Any]] = [DiffusionPipeline.from_pretrained, KINDS[kind].from_pretrained]
    part = path.partition("/")[0]
    if part in PARTS and not (kind == "stock" and part == "unet"):
        found.append(lambda folder: PARTS[part].from_pretrained(folder, subfolder=part))
    return found


def edited(source: Path, place: Path, path: str, change: Callable[[Any], Any]) -> Path:
    shutil.copytree(source, place)
    file = place / path
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return place


def without(*keys: str) -> Callable[[Any], Any]:
    return lambda config: {key: value for key, value in config.items() if key not in keys}


def with_(**fields: Any) -> Callable[[Any], Any]:
    return lambda config: config | fields


Row = tuple[str, str, Callable[[Any], Any], str]
ROWS: dict[str, Row] = {
    # A field that is always written.
    "a scheduler without its levels": ("carried", SCHEDULER, without("num_levels"), "num_levels"),
    "a scheduler without its target": ("carried", SCHEDULER, without("prediction_type"), "prediction_type"),
    "a scheduler without its schedule": ("carried", SCHEDULER, without("noise_schedule"), "noise_schedule"),
    "an empty scheduler": ("carried", SCHEDULER, lambda _: {}, ""),
    "a network without a field": ("carried", UNET, without("add_input"), "add_input"),
    "a stock network without a field": ("stock", UNET, without("act_fn"), "act_fn"),
    "an autoencoder without its levels": ("latent", "first_stage/config.json", without("num_levels"), "num_levels"),
    "a hierarchy without its depth": ("hvae", "hvae/config.json", without("depth"), "depth"),
    # A component that the config needs.
    "an index without the learned schedule": ("carried", INDEX, without("noise_schedule"), "noise_schedule"),
    "an index that denies it": ("carried", INDEX, with_(noise_schedule=[None, None]), "noise_schedule"),
    "an index that denies it, and its folder gone": ("carried", INDEX, with_(noise_schedule=[None, None]), ""),
    "an index without a network": ("carried", INDEX, without("unet"), "unet"),
    "an index without a first stage": ("latent", INDEX, without("first_stage"), "first_stage"),
    # Another class.
    "a pipeline of another rung": ("carried", INDEX, with_(_class_name="LatentVDMPipeline"), ""),
    "a pipeline and a part of no library": (
        "hvae",
        INDEX,
        with_(_class_name="HVAEPipelin", hvae=["vdm_hum", "MarkovianHVAE"]),
        "HVAEPipelin",
    ),
    "an index that is no pipeline's": ("carried", INDEX, lambda _: {}, ""),
    "a network of another class": ("carried", UNET, with_(_class_name="MarkovianHVAE"), "MarkovianHVAE"),
    "a scheduler in the place of a network": ("carried", INDEX, with_(unet=["vdm_hub", "VDMScheduler"]), "unet"),
    # Fields that nobody knows.
    "a misspelt field": ("carried", SCHEDULER, with_(num_level=3), "num_levels"),
    "a misspelt field of a network": ("carried", UNET, with_(dropuot=0.5), "dropout"),
    "a field of the index": ("carried", INDEX, with_(latent_scaling=None), "latent_scaling"),
    "a field within an autoencoder": (
        "latent",
        "first_stage/config.json",
        lambda config: config | {"autoencoder_config": config["autoencoder_config"] | {"ouu_channels": 1}},
        "out_channels",
    ),
    # Other types.
    "a word for a number": ("stock", UNET, with_(layers_per_block="cosine"), "layers_per_block"),
    "betas of nothing": ("carried", SCHEDULER, with_(trained_betas=[None]), "trained_betas"),
    "a size of no sides": ("stock", UNET, with_(sample_size=[]), "sample_size"),
    "a truth for a number": ("carried", UNET, with_(dropout=True), "dropout"),
    "a number for a list": ("hvae", "hvae/config.json", with_(latent_shapes=4), "latent_shapes"),
    "a scheduler that is the name of another": ("carried", SCHEDULER, lambda _: "other/repo", ""),
    "a scheduler that is a number": ("carried", SCHEDULER, lambda _: 0, ""),
    "a network that is a list": ("carried", UNET, lambda _: [], ""),
    # Beyond all bounds.
    "ten thousand layers": ("carried", UNET, with_(layers_per_block=10_000), "layers_per_block"),
    "a thousand layers": ("carried", UNET, with_(layers_per_block=1_000), ""),
    "ten thousand layers of a stock network": ("stock", UNET, with_(layers_per_block=10_000), ""),
    "wide layers": ("stock", UNET, with_(block_out_channels=[65_536, 65_536]), ""),
    "many timesteps": ("carried", SCHEDULER, with_(num_train_timesteps=10_000_000), "num_train_timesteps"),
    "many levels": ("carried", SCHEDULER, with_(num_levels=1_000_000), "num_levels"),
    "many hidden units": (
        "carried",
        "noise_schedule/config.json",
        with_(noise_schedule={"name": "learned_monotone", "config": {"hidden_features": 10**9}}),
        "",
    ),
}


@pytest.mark.parametrize("what", sorted(ROWS))
def test_a_config_that_was_not_saved_so_is_refused_by_every_door(
    what: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    kind, path, change, word = ROWS[what]
    folder = edited(saved[kind], tmp_path / "model", path, change)
    if what.endswith("folder gone"):
        shutil.rmtree(folder / "noise_schedule")
    held, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for door in doors(kind, path):
        if what == "a pipeline of another rung" and door == DiffusionPipeline.from_pretrained:
            continue  # the class that is named then lacks what it needs: the same error, from that class
        with pytest.raises(VDMHubError) as caught:
            door(folder)
        text = str(caught.value)
        assert word in text and len(text) <= 1000 and "\n" not in text, text
    assert torch.is_grad_enabled(), "and nothing of the process is changed"
    assert time.process_time() - started < 10, "a small file costs no more than a moment, by all doors together"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 100 * 1024


@pytest.mark.parametrize("command", [["evaluate", "--dataset_name", "digits"], ["sample"]])
def test_the_commands_say_the_same_in_one_paragraph(
    command: list[str], saved: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    folder = edited(saved["carried"], tmp_path / "model", SCHEDULER, lambda _: 0)
    output = [] if command[0] == "evaluate" else ["--output", str(tmp_path / "grid.png")]
    assert main([command[0], str(folder), *command[1:], *output]) == 2
    said = capsys.readouterr().err.strip()
    assert "scheduler_config.json" in said.splitlines()[-1] and "Traceback" not in said


def test_a_pipeline_is_not_loaded_as_another(saved: dict[str, Path]) -> None:
    for cls, kind in (
        (VDMPipeline, "latent"),
        (VDMPipeline, "hvae"),
        (HVAEPipeline, "carried"),
        (VDMPipeline, "ddpm"),
    ):
        with pytest.raises(CheckpointError, match=cls.__name__):
            cls.from_pretrained(saved[kind])


@pytest.mark.parametrize("cls", PARTS.values())
@pytest.mark.parametrize("config", ["other/repo", 0, None, [("num_levels", 3)], Path("x")])
def test_a_component_is_made_of_mappings_alone(cls: Any, config: Any) -> None:
    with pytest.raises(ConfigurationError, match="mapping"):
        cls.from_config(config)


@pytest.mark.parametrize("kind", ["carried", "stock"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.int32, torch.complex64])
def test_weights_of_another_type_than_is_saved_are_refused(
    kind: str, dtype: torch.dtype, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved[kind], folder)
    weights = load_file(folder / "unet" / WEIGHTS)
    name = next(key for key in weights if key.endswith("weight"))
    save_file(weights | {name: weights[name].to(dtype)}, folder / "unet" / WEIGHTS)
    for door in doors(kind, "unet/x"):
        with pytest.raises(CheckpointError, match=name):
            door(folder)


@pytest.mark.parametrize("kind", ["carried", "stock"])
def test_weights_that_name_a_tensor_twice_are_refused(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[kind], tmp_path / "model"))
    content = (folder / "unet" / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    name, about = next((key, value) for key, value in json.loads(header).items() if key != "__metadata__")
    doubled = header[:-1] + f", {json.dumps(name)}: {json.dumps(about)}}}".encode()
    (folder / "unet" / WEIGHTS).write_bytes(len(doubled).to_bytes(8, "little") + doubled + content[8 + size :])
    for door in doors(kind, "unet/x"):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            door(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_in_any_precision_that_is_saved_load(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_pipeline().to(dtype).save_pretrained(tmp_path)
    VDMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("network", ["own", "stock"])
@pytest.mark.parametrize("first", ["whole", "sharded", "pickled"])
@pytest.mark.parametrize("second", ["whole", "sharded"])
def test_a_save_takes_the_place_of_an_earlier_one(network: str, first: str, second: str, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "sharded": {"max_shard_size": "5KB"},
        "pickled": {"safe_serialization": False},
    }
    old, new = (tiny_pipeline(tiny_unet_2d() if network == "stock" else None) for _ in range(2))
    with torch.no_grad():
        for parameter in new.unet.parameters():
            parameter.mul_(1.25)
    old.save_pretrained(tmp_path / "pipeline", **ways[first])
    old.unet.save_pretrained(tmp_path / "network", **ways[first])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which names what it removes
        new.save_pretrained(tmp_path / "pipeline", **ways[second])
        if network == "own":
            new.unet.save_pretrained(tmp_path / "network", **ways[second])
    expected = sampled(new)
    assert torch.equal(sampled(quiet(VDMPipeline.from_pretrained(tmp_path / "pipeline"))), expected)
    if network == "own":
        loaded = UNetVDMModel.from_pretrained(tmp_path / "network")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), new.unet.parameters(), strict=True))


def test_a_pickle_over_safetensors_is_refused_and_the_old_weights_are_gone(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=WEIGHTS):
        tiny_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match="unpickled"):
        VDMPipeline.from_pretrained(tmp_path)


def test_a_variant_stays_beside_another(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, variant="ema")
    for variant in (None, "ema"):
        assert torch.equal(sampled(quiet(VDMPipeline.from_pretrained(tmp_path, variant=variant))), sampled(pipe))
    with pytest.raises(ConfigurationError, match="fp16"):
        VDMPipeline.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("whole", [True, False], ids=["saved", "gone"])
def test_a_learned_schedule_is_never_replaced_by_an_untrained_one(
    whole: bool, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["carried"], tmp_path / "model"))
    own = RegisteredModel.from_pretrained(folder, subfolder="noise_schedule")
    scheduler = VDMScheduler.from_pretrained(folder, subfolder="scheduler")
    if not whole:
        shutil.rmtree(folder / "noise_schedule")
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(index | {"noise_schedule": [None, None]}))
    ways: list[dict[str, Any]] = [{"noise_schedule": None}, {"noise_schedule": None, "scheduler": scheduler}]
    for given in ways if whole else [*ways, {}, {"scheduler": scheduler}]:
        with pytest.raises(VDMHubError, match="noise_schedule"):
            VDMPipeline.from_pretrained(folder, **given)
    for given in ({"noise_schedule": own}, {"noise_schedule": own, "scheduler": scheduler}):
        loaded = VDMPipeline.from_pretrained(folder, **given)
        assert loaded.noise_schedule is own


@pytest.mark.parametrize("loader", [VDMPipeline, DiffusionPipeline])
@pytest.mark.parametrize("name", ["unet", "scheduler", "noise_schedule", "preprocessing", "held_out"])
def test_nothing_given_for_what_was_saved_is_refused(loader: Any, name: str, saved: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match=naming(name, None)):
        loader.from_pretrained(saved["carried"], **{name: None})


@pytest.mark.parametrize("name", ["foo", "schedular", "num_levels", "latent_scaling", "subfolder"])
def test_an_argument_that_would_be_ignored_is_refused_with_those_that_are_known(
    name: str, saved: dict[str, Path]
) -> None:
    for load in (VDMPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        with pytest.raises(ConfigurationError, match=naming(name, "scheduler")):
            load(saved["carried"], **{name: 1})
    if name != "num_levels":
        with pytest.raises(ConfigurationError, match=f"'{name}'"):
            VDMPipeline.from_diffusers(saved["ddpm"], num_levels=17, **{name: 1})


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "whole")
    tiny_pipeline().save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    for file in (tmp_path / "whole" / "unet").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "shards" / "unet")
    with pytest.raises(CheckpointError, match="twice"):
        VDMPipeline.from_pretrained(tmp_path / "shards")


def test_a_stock_network_of_an_older_diffusers_may_lack_what_was_added_since(tmp_path: Path) -> None:
    tiny_pipeline(tiny_unet_2d()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / UNET).read_text())
    (tmp_path / UNET).write_text(json.dumps(without("mid_block_type")(config) | {"_diffusers_version": "0.20.0"}))
    assert isinstance(VDMPipeline.from_pretrained(tmp_path).unet, UNet2DModel)


def test_the_doors_for_components_take_no_link_out_of_the_folder(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved["carried"], folder)
    (tmp_path / "secret.json").write_text('{"password": 1}')
    for part, name in (("scheduler", "scheduler_config.json"), ("unet", "config.json")):
        (folder / part / name).unlink()
        (folder / part / name).symlink_to(tmp_path / "secret.json")
        with pytest.raises(CheckpointError, match="link") as caught:
            PARTS[part].from_pretrained(folder, subfolder=part)
        assert "password" not in str(caught.value)
