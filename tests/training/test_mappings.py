"""Mappings on the command line are merged into the recipe's, key by key."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from naming import naming
from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes.arguments import Configuration, parse_recipe

UNET = {"_class_name": "UNetVDMModel", "block_out_channels": [32, 64], "layers_per_block": 3, "dropout": 0.1}
BOTH = {"name": "linear", "config": {"gamma_min": -8.0, "gamma_max": 5.0}}
TEXT = """
dataset_name: digits
max_train_steps: 5
model: {model}
unet: {unet}
noise_schedule: {schedule}
"""


def made(folder: Path, schedule: Any = "linear", model: str = "vdm", **more: Any) -> str:
    path = folder / "mine.yaml"
    text = TEXT.format(model=model, unet=json.dumps(UNET), schedule=json.dumps(schedule))
    path.write_text(text + "".join(f"{name}: {json.dumps(value)}\n" for name, value in more.items()))
    return str(path)


def unet(configuration: Configuration) -> Any:
    return json.loads(configuration.model.unet)


def quietly(argv: list[str]) -> Configuration:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_recipe(argv)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["--unet", '{"block_out_channels": [16, 32]}'], {"block_out_channels": [16, 32]}),
        (['--unet={"dropout": 0, "layers_per_block": 1}'], {"dropout": 0, "layers_per_block": 1}),
        (["--unet.layers_per_block", "2"], {"layers_per_block": 2}),
        (["--unet.layers_per_block=010"], {"layers_per_block": 10}),
        (["--unet.block_out_channels", "[8]"], {"block_out_channels": [8]}),
        (["--unet.norm_num_groups", "4", "--unet.dropout", "0.5"], {"norm_num_groups": 4, "dropout": 0.5}),
        (["--unet", '{"dropout": 0.2}', "--unet.layers_per_block", "1"], {"dropout": 0.2, "layers_per_block": 1}),
        (
            ["--unet.dropout", "0.3", "--unet", '{"dropout": 0.2, "layers_per_block": 1}'],
            {"dropout": 0.3, "layers_per_block": 1},
        ),
        (["--unet._class_name", "UNetVDMModel"], {}),
        (["--unet", '{"_class_name": "UNetVDMModel", "dropout": 0.2}'], {"dropout": 0.2}),
        (["--unet.block_out_channels", "null"], {"block_out_channels": None}),
    ],
)
def test_a_mapping_changes_its_own_keys_only(words: list[str], change: dict[str, Any], tmp_path: Path) -> None:
    path = made(tmp_path)
    for argv in ([path, *words], [*words, path]):
        assert unet(quietly(argv)) == UNET | change


@pytest.mark.parametrize(
    ("schedule", "words", "becomes"),
    [
        (BOTH, ["--noise_schedule.config.gamma_min", "-7"],
         {"name": "linear", "config": {"gamma_min": -7, "gamma_max": 5.0}}),
        (BOTH, ["--noise-schedule", '{"config": {"gamma_max": 4}}'],
         {"name": "linear", "config": {"gamma_min": -8.0, "gamma_max": 4}}),
        ("linear", ["--noise_schedule.config.gamma_min", "-7"], {"name": "linear", "config": {"gamma_min": -7}}),
        ("cosine", ["--noise_schedule", "linear", "--noise_schedule.config.gamma_min", "-7"],
         {"name": "linear", "config": {"gamma_min": -7}}),
        ({"name": "linear", "config": {"gamma_min": -8.0}}, ["--noise_schedule", "linear"], "linear"),
        ({"name": "linear", "config": {"gamma_min": -8.0}}, ["--noise_schedule", "cosine"], "cosine"),
    ],
)  # fmt: skip
def test_names_take_all_away_and_their_arguments_are_merged(
    schedule: Any, words: list[str], becomes: Any, tmp_path: Path
) -> None:
    found = quietly([made(tmp_path, schedule), *words]).diffusion.noise_schedule
    assert (json.loads(found) if found.startswith("{") else found) == becomes


def test_another_class_takes_no_arguments_over_and_says_so(tmp_path: Path) -> None:
    path = made(tmp_path, {"name": "learned_linear", "config": {"gamma_min": -8.0}})
    with pytest.warns(UserWarning, match=naming("UNet2DModel", "block_out_channels", "dropout", "layers_per_block")):
        assert unet(parse_recipe([path, "--unet", '{"_class_name": "UNet2DModel"}'])) == {"_class_name": "UNet2DModel"}
    with pytest.warns(UserWarning, match=r"noise_schedule .*linear.*learned_linear.*config"):
        found = parse_recipe([path, "--noise_schedule", '{"name": "linear", "config": {"gamma_max": 4}}'])
    assert json.loads(found.diffusion.noise_schedule) == {"name": "linear", "config": {"gamma_max": 4}}
    with pytest.warns(UserWarning, match="noise_schedule"):
        parse_recipe([path, "--noise_schedule.name", "cosine"])


def test_an_empty_mapping_takes_the_recipe_s_away(tmp_path: Path) -> None:
    """As the two stages of a latent VDM need it, whose first stage is trained elsewhere."""
    assert unet(quietly([made(tmp_path), "--unet", "{}"])) == {}
    latent = quietly(["digits_latent", "--first_stage", "{}", "--first_stage_from", "runs/vae/pipeline"])
    assert latent.model.first_stage_config == {}
    merged = quietly(["digits_latent", "--first_stage.dropout", "0.2", "--hvae", "{}"])
    assert merged.model.first_stage_config == parse_recipe(["digits_latent"]).model.first_stage_config | {
        "dropout": 0.2
    }


def test_fields_that_the_recipe_is_silent_on_are_begun(tmp_path: Path) -> None:
    path = made(tmp_path, model="latent_vdm")
    assert quietly([path, "--first_stage.depth", "1"]).model.first_stage_config == {"depth": 1}
    assert json.loads(quietly([path, "--conditioning", '{"name": "affine"}']).diffusion.conditioning or "") == {
        "name": "affine"
    }
    assert quietly([path, "--conditioning", "none"]).diffusion.conditioning is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--unet.layers_per_block"], "--unet.layers_per_block"),
        (["--unet.layers_per_block", "--seed", "1"], "--unet.layers_per_block"),
        (["--unit.layers_per_block", "1"], "did you mean 'unet'"),
        (["--seed.x", "1"], "--seed.x"),
        (["--unet.", "1"], "--unet."),
        (["--unet..x", "1"], "--unet..x"),
        (["--unet.x", "&a [1]"], "anchor"),
        (["--unet.x", "[1"], "--unet.x"),
        (["--unet", '{"dropout": 1, "dropout": 2}'], "twice"),
        (["--unet", '{"dropout": .inf}'], "unet"),
        (["--unet", '{"a": ' * 3000], "levels"),
        (["--unet", "[1]"], "unet"),
        (["--noise_schedule", '{"nam": "linear"}'], "did you mean 'name'"),
        (["--noise_schedule.config", "3"], "config"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_in_one_paragraph(words: list[str], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe([made(tmp_path), *words])
    assert named in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("template", ["{label}", "{label} on grey"])
def test_a_text_that_begins_with_a_brace_is_no_mapping(template: str) -> None:
    words = ["digits", "--label_column", "label", "--text_encoder", "an-encoder", "--caption_template", template]
    assert parse_recipe(words).data.caption_template == template
