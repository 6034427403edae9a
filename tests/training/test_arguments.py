"""Recipes and command lines: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from naming import paragraph
from vdm_hub.data.arguments import DataArguments
from vdm_hub.errors import ConfigurationError, MissingPluginError
from vdm_hub.recipes.arguments import FIELDS, GROUPS, Configuration, load_recipe, parse_recipe, recipes
from vdm_hub.recipes.configuration import TrainingArguments

MINIMAL = {"dataset_name": "digits", "max_train_steps": 5}


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


refused = partial(paragraph, (ConfigurationError, MissingPluginError), parse_recipe)


@pytest.mark.parametrize("recipe", recipes())
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(recipe: str, tmp_path: Path) -> None:
    try:
        configuration = parse_recipe([recipe])
    except MissingPluginError as error:
        assert "vdm-hub-tokens" in str(error) and recipe in ("python_source", "shakespeare")
        pytest.skip(str(error))
    assert configuration.recipe == recipe
    assert configuration.training.output_dir == f"runs/{recipe}"
    assert parse_recipe([write(tmp_path, configuration.to_yaml())]) == configuration
    assert Configuration.from_dict(configuration.to_dict()) == configuration


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-12, 1e3),
            "adam_epsilon": st.floats(1e-300, 1.0),
            "adam_beta1": st.floats(0, 1, exclude_max=True),
            "seed": st.integers(0, 2**63 - 1),
            "mixed_precision": st.sampled_from(["no", "fp16", "bf16", None]),
            "use_ema": st.booleans(),
            "transitions": st.none() | st.integers(1, 10**6),
            "image_column": st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1),
            "noise_schedule": st.fixed_dictionaries(
                {"name": st.sampled_from(["linear", "cosine"]), "config": st.dictionaries(st.text(), st.floats(-9, 9))}
            ),
        },
    )
)
def test_yaml_is_inverted_by_parsing(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    configuration = Configuration.from_dict(MINIMAL | values, recipe="drawn")
    path = write(tmp_path_factory.mktemp("recipe"), configuration.to_yaml())
    assert parse_recipe([path]) == configuration


def test_the_command_line_overrides_the_recipe_in_either_spelling() -> None:
    configuration = parse_recipe(
        ["--seed", "3", "digits", "--learning_rate=1e-4", "--train-batch-size", "7", "--random_flip", "--no_use_ema"]
    )
    training = configuration.training
    assert (training.seed, training.learning_rate, training.train_batch_size, training.use_ema) == (3, 1e-4, 7, False)
    assert configuration.data.random_flip is True
    assert configuration.data.num_levels == 17, "what is not given stays the recipe's"
    assert parse_recipe(["digits", "--use_ema", "false"]).training.use_ema is False
    assert parse_recipe(["digits", "--validation_images", "none"]).training.validation_images is None


def test_a_field_on_the_command_line_takes_the_place_of_its_alternative() -> None:
    configuration = parse_recipe(["digits", "--num_train_epochs", "2", "--train_data_dir", "pictures"])
    assert (configuration.training.max_train_steps, configuration.training.num_train_epochs) == (None, 2)
    assert (configuration.data.dataset_name, configuration.data.train_data_dir) == (None, "pictures")
    assert "max_train_steps" in refused(["digits", "--num_train_epochs", "2", "--max_train_steps", "2"])


def test_yaml_scalars_become_what_the_field_says(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'dataset_name: digits\nmax_train_steps: 1e3\nlearning_rate: "1e-4"\nadam_epsilon: 1e-7\nmax_grad_norm: 1\n'
        "mixed_precision: no\nuse_ema: no\nscale_lr: 'true'\ndataset_config_name: null\n"
        "noise_schedule:\n  name: linear\n  config: {gamma_min: -8, gamma_max: 5e0}\n",
    )
    configuration = parse_recipe([path])
    training = configuration.training
    assert training.max_train_steps == 1000 and isinstance(training.max_train_steps, int)
    assert (training.learning_rate, training.adam_epsilon, training.max_grad_norm) == (1e-4, 1e-7, 1.0)
    assert isinstance(training.max_grad_norm, float)
    assert (training.mixed_precision, training.use_ema, training.scale_lr) == ("no", False, True)
    assert json.loads(configuration.diffusion.noise_schedule)["config"] == {"gamma_min": -8, "gamma_max": 5.0}
    assert configuration.recipe == "mine" and training.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("max_train_steps: many", ["max_train_steps", "'many'", "integer"]),
        ("max_train_steps: 2.5", ["max_train_steps", "2.5", "integer"]),
        ("max_train_steps: true", ["max_train_steps", "True", "integer"]),
        ("max_train_steps: .inf", ["max_train_steps", "integer"]),
        ("learning_rate: fast", ["learning_rate", "'fast'", "number"]),
        ("learning_rate: [1]", ["learning_rate", "[1]", "number"]),
        ("learning_rate: nan", ["learning_rate", "'nan'", "number"]),
        ("learning_rate: .nan", ["learning_rate", "nan"]),
        ("learning_rate: .inf", ["learning_rate", "inf"]),
        ("use_ema: maybe", ["use_ema", "'maybe'", "true or false"]),
        ("use_ema: 3", ["use_ema", "3", "true or false"]),
        ("dataset_config_name: 10", ["dataset_config_name", "10", "text"]),
        ("seed: null", ["seed", "None", "integer"]),
        ("color: gray", ["color", "'gray'", "grey"]),
        ("unet: [1, 2]", ["unet", "[1, 2]", "mapping"]),
        ("max_train_step: 5", ["'max_train_step'", "did you mean 'max_train_steps'"]),
        ("learning-rate: 5", ["'learning-rate'", "did you mean 'learning_rate'"]),
        ("1: 5", ["'1'"]),
        ("seed: 1\nseed: 2", ["'seed'", "twice"]),
        ("seed: [", ["YAML"]),
    ],
)
def test_a_mistake_in_a_recipe_names_field_value_and_type(tmp_path: Path, line: str, words: list[str]) -> None:
    rest = {key: value for key, value in MINIMAL.items() if not line.startswith(key + ":")}
    path = write(tmp_path, f"{yaml.safe_dump(rest)}{line}\n")
    message = refused([path])
    assert all(
        word in message for word in [*words, "finite" if ": ." in line and "max" not in line else "mine.yaml"]
    ), message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no recipe", "digits"]),
        (["digit"], ["'digit'", "did you mean 'digits'"]),
        (["nowhere/mine.yaml"], ["nowhere/mine.yaml", "digits"]),
        (["digits", "other"], ["one recipe", "'other'"]),
        (["digits", "--max_train_step", "5"], ["did you mean 'max_train_steps'"]),
        (["--max_train_step", "5", "digits"], ["did you mean 'max_train_steps'"]),
        (["digits", "--max_train", "5"], ["unknown field 'max_train'"]),
        (["digits", "--seed"], ["--seed", "expected one argument"]),
        (["digits", "--seed", "x"], ["seed", "'x'", "an integer", "command line"]),
        (["digits", "--noise_schedule", "cosin"], ["did you mean 'cosine'"]),
        (["digits", "--noise_schedule", '{"name": "cosin"}'], ["did you mean 'cosine'"]),
        (["digits", "--noise_schedule", '{"name"'], ["noise_schedule", "mapping"]),
        (["digits", "--prediction_type", "epsilom"], ["did you mean 'epsilon'"]),
        (["digits", "--unet", "big"], ["unet", "'big'", "JSON"]),
        (["digits", "--unet", '{"_class_name": "UNetVDM"}'], ["did you mean 'UNetVDMModel'"]),
        (["digits", "--lr_scheduler", "cosin"], ["did you mean 'cosine'"]),
        (["digits", "--report_to", "tensorbord"], ["did you mean 'tensorboard'"]),
        (["digits", "--num_levels", "300"], ["num_levels", "300", "256"]),
        (["digits", "--train_batch_size", "0"], ["train_batch_size", "0", "at least 1"]),
        (["digits", "--adam_beta2", "1"], ["adam_beta2", "1.0"]),
        (["digits", "--center_crop", "yes"], ["center_crop", "resolution"]),
        (["digits", "--validation_size", "9", "--validation_split", "v"], ["validation_size", "9", "'v'"]),
    ],
)
def test_a_mistake_on_the_command_line_is_refused_in_one_paragraph(argv: list[str], words: list[str]) -> None:
    message = refused(argv)
    assert all(word in message for word in words), message


def test_a_recipe_without_dataset_or_length_is_refused(tmp_path: Path) -> None:
    assert "train_data_dir" in refused([write(tmp_path, "max_train_steps: 5\n")])
    assert "num_train_epochs" in refused([write(tmp_path, "dataset_name: digits\n")])
    assert "mapping" in refused([write(tmp_path, "- digits\n")])


def test_help_explains_every_field_with_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(["digits", "--seed", "77", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group in GROUPS:
        assert f" {group._argument_group_name}: " in text
        for field in fields(group):
            assert f"--{field.name} " in text
            assert len(field.metadata["help"]) > 10
    assert "(default: 17)" in text, "num_levels of the recipe"


def test_fields_are_unique_over_the_groups() -> None:
    assert len(FIELDS) == sum(len(fields(group)) for group in GROUPS)


def test_a_recipe_may_give_some_fields_only(tmp_path: Path) -> None:
    configuration = parse_recipe([write(tmp_path, "num_train_epochs: 1\n"), "--dataset_name", "cifar10"])
    assert configuration.data == DataArguments(dataset_name="cifar10")
    assert configuration.training == TrainingArguments(num_train_epochs=1, output_dir="runs/mine")


def test_trackers() -> None:
    assert TrainingArguments(max_train_steps=1, report_to="none").trackers == ()
    assert TrainingArguments(max_train_steps=1, report_to="tensorboard, wandb").trackers == ("tensorboard", "wandb")


def test_loading_a_recipe_tells_where_it_comes_from(tmp_path: Path) -> None:
    name, values, where = load_recipe(write(tmp_path, "recipe: other\nseed: 1\n"))
    assert (name, values) == ("other", {"seed": 1}) and "mine.yaml" in where


# ---- tokens ---------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aBcD1234" * 4 + "xy"


@pytest.mark.parametrize("value", [TOKEN, "hf_short"])
@pytest.mark.parametrize("name", ["hub_token", "hub-token", "token", "hf_token", "use_auth_token"])
def test_a_token_is_refused_with_the_places_that_it_may_come_from(name: str, value: str, tmp_path: Path) -> None:
    recipe_with_token = write(
        tmp_path, f"dataset_name: digits\nmax_train_steps: 1\n{name.replace('-', '_')}: {value}\n"
    )
    lines = [["digits", f"--{name}", value], [f"--{name}={value}", "digits"], ["digits", f"--{name}"]]
    for argv in [*lines, [recipe_with_token]]:
        message = refused(argv)
        assert "hf auth login" in message and "HF_TOKEN" in message, message
        assert value not in message


@pytest.mark.parametrize("value", [TOKEN, "hf_short"])
def test_no_message_repeats_what_may_be_a_token(value: str, tmp_path: Path) -> None:
    """Wherever it was put by mistake: as an unknown field's value, in a field of another type, or as the recipe."""
    mistakes = [
        ["digits", "--hub_tokn", value],
        ["digits", f"--hub_tokn={value}"],
        ["digits", value],
        [value],
        ["digits", "--seed", value],
        ["digits", "--use_ema", value],
        ["digits", f"--no_use_ema={value}"],
        ["digits", "--color", value],
        ["digits", "--noise_schedule", value],
        ["digits", "--noise_schedule", json.dumps({"name": value, "package": value})],
        ["digits", "--unet", json.dumps({"_class_name": value})],
        ["digits", "--report_to", value],
        ["digits", "--hub_model_id", value],
        [write(tmp_path, f"dataset_name: digits\nmax_train_steps: {value}\n")],
    ]
    for argv in mistakes:
        assert value not in refused(argv), argv


def test_a_token_is_no_value_of_any_field() -> None:
    for field in ("output_dir", "hub_model_id", "dataset_name", "image_column"):
        words = ["--push_to_hub"] if field == "hub_model_id" else []
        message = refused(["digits", f"--{field}", TOKEN, *words])
        assert field in message and "HF_TOKEN" in message and TOKEN not in message


def test_publishing_is_asked_for_in_the_words_of_diffusers() -> None:
    training = parse_recipe(
        ["digits", "--push_to_hub", "--hub_model_id", "me/vdm-digits", "--hub_private_repo"]
    ).training
    assert (training.push_to_hub, training.hub_repository, training.hub_private_repo) == (True, "me/vdm-digits", True)
    assert parse_recipe(["digits", "--push_to_hub"]).training.hub_repository == "digits"
    assert parse_recipe(["digits"]).training.push_to_hub is False
