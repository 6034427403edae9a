"""A recipe that begins from a trained model, field by field: taken over, kept as asked for and said, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import UniPCMultistepScheduler

import tiny_tokens
from distributions import write_metadata, write_pixelwise
from naming import naming
from spaces import kinds
from tiny import LEVELS, quiet, tiny_pipeline, tiny_unet
from vdm_hub import LatentVDMPipeline, VDMPipeline, VDMScheduler
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.first_stages import AutoencoderKLFirstStage
from vdm_hub.recipes.arguments import Configuration, defaults
from vdm_hub.recipes.configuration import OF_A_MODEL
from vdm_hub.training.parts.taking_over import PROCESS, differs, take_over

NAME = "me/model"
IMAGES = {"resolution": 8, "center_crop": True, "color": "grey"}
KNOWN = IMAGES | {"num_levels": LEVELS, "image_column": "image"}
HELD = {"split": "train", "images": 40, "size": 6, "seed": 0, "label_column": None, "skip_corrupt": False}
HELD |= {"fingerprint": None}
TABLE = {"name": "discrete_betas", "config": {"betas": [0.001 * one for one in range(1, 60)]}}
RANGE = {"name": "linear", "config": {"gamma_min": -7.5, "gamma_max": 4.0}}

pytestmark = pytest.mark.usefixtures("token_plugin")


def prepared() -> VDMPipeline:
    """A model that knows its preprocessing, and what was held out."""
    scheduler = VDMScheduler(num_levels=LEVELS, noise_schedule=RANGE)
    return VDMPipeline(tiny_unet(), scheduler, preprocessing=KNOWN, held_out=HELD)


def classes(dropout: float = 0.1, names: Sequence[str] = ("cat", "dog", "bird")) -> VDMPipeline:
    told = {"column": "digit", "count": len(names), "names": list(names), "dropout": dropout}
    unet = tiny_unet(num_class_embeds=len(names) + (dropout > 0))
    return quiet(VDMPipeline(unet, VDMScheduler(num_levels=LEVELS), classes=told))


def captions(template: str | None = None, with_encoder: bool = True) -> VDMPipeline:
    made = kinds.captions()
    told = dict(made.config.captions) | {"template": template, "column": "label" if template else "words"}
    text = {"text_encoder": made.text_encoder, "tokenizer": made.tokenizer} if with_encoder else {}
    return VDMPipeline(made.unet, made.scheduler, captions=told, **text)


def of_autoencoder_kl() -> LatentVDMPipeline:
    config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    stage = AutoencoderKLFirstStage(config | {"latent_channels": 1}, sample_size=8, num_levels=LEVELS)
    return LatentVDMPipeline(stage, tiny_unet(), VDMScheduler(num_levels=LEVELS))


def tokens() -> Any:
    return tiny_tokens.pipeline(context=2)


def timed() -> Any:
    from vdm_hub.models.token_networks import TokenTimeEmbedding

    return tiny_tokens.pipeline(time_embedding=TokenTimeEmbedding(8))


MODELS = {kinds.hvae: "hvae", kinds.latent: "latent_vdm", of_autoencoder_kl: "latent_vdm"}
MODELS |= {tokens: "tokens", timed: "tokens"}
Make = Callable[[], Any]


def taken(make: Make, recipe: dict[str, Any], **asked: Any) -> tuple[Configuration, list[str]]:
    """The recipe with a model's answers, and what is said; ``recipe`` has what nobody asked for."""
    texts = {"dataset_name": "texts", "tokenizer": "character"} if MODELS.get(make) == "tokens" else {}
    usual = {"max_train_steps": 1, "dataset_name": "digits", "init_from": NAME, "model": MODELS.get(make, "vdm")}
    chosen = Configuration.from_dict(usual | texts | recipe | asked)
    return take_over(replace(chosen, asked={name: chosen.asked[name] for name in asked}), make(), NAME)


def value(configuration: Configuration, field: str) -> Any:
    given = configuration.to_dict()[field]
    return json.loads(given) if isinstance(given, str) and given.startswith("{") else given


def about(said: list[str], field: str) -> list[str]:
    return [line for line in said if line.startswith(f"{field} ")]


# ---- a model's own ----------------------------------------------------------------------------------------------

NEEDED: dict[str, dict[str, Any]] = {"center_crop": {"resolution": 8}}  # with a field, by the recipe

OWN: list[tuple[Make, str, Any, Any]] = [  # the model, a field, its value there, and another in the recipe
    (prepared, "num_levels", LEVELS, 9),
    (prepared, "resolution", 8, 16),
    (prepared, "center_crop", True, None),
    (prepared, "color", "grey", "rgb"),
    (prepared, "test_size", 6, 12),
    (prepared, "noise_schedule", RANGE, "cosine"),
    (prepared, "prediction_type", "epsilon", "v_prediction"),
    (prepared, "conditioning", {"name": "affine", "config": RANGE["config"]}, "flow_time"),
    (prepared, "data_scaling", "bin_centers", "unit"),
    (prepared, "decoder", "factorised", "ddpm"),
    (prepared, "num_train_timesteps", 1000, 50),
    (kinds.hvae, "num_levels", LEVELS, 9),
    (kinds.latent, "num_levels", LEVELS, 9),
    (lambda: tiny_pipeline(noise_schedule=TABLE), "noise_schedule", "discrete_betas", "cosine"),
    (classes, "condition_dropout", 0.1, 0.4),
    (captions, "condition_dropout", 0.1, 0.4),
    (captions, "label_column", None, None),
    (tokens, "window_length", 8, 16),
    (tokens, "window_context", 2, 1),
    (timed, "time_embedding", True, None),
]


@pytest.mark.parametrize(("make", "field", "own", "other"), OWN, ids=lambda one: one if isinstance(one, str) else "")
def test_what_nobody_asked_for_is_the_models_own(make: Make, field: str, own: Any, other: Any) -> None:
    """It is said where the recipe has another, by both values, and only there."""
    alone, said = taken(make, {})
    assert value(alone, field) == own and not about(said, field)
    assert not about(taken(make, NEEDED.get(field, {}) | {field: own})[1], field)
    if other is not None:
        of_recipe, said = taken(make, {field: other})
        assert value(of_recipe, field) == own and len(about(said, field)) == 1
        assert str(other) in about(said, field)[0] and NAME in about(said, field)[0]
    assert set(alone.asked) == set(OF_A_MODEL), "from now on all of it is asked for"
    assert all(alone.asked[name] == alone.to_dict()[name] for name in OF_A_MODEL)


ASKED = [one for one in OWN if one[1] in (*PROCESS, *IMAGES, "test_size", "window_length", "window_context")]
ASKED += [(prepared, "num_levels", LEVELS, 9), (classes, "condition_dropout", 0.1, 0.4)]
ASKED += [(captions, "condition_dropout", 0.1, 0.0)]


@pytest.mark.parametrize(("make", "field", "own", "other"), ASKED, ids=lambda one: one if isinstance(one, str) else "")
def test_what_is_asked_for_holds_and_is_said(make: Make, field: str, own: Any, other: Any) -> None:
    other, needed = {"center_crop": False}.get(field, other), NEEDED.get(field, {})
    run, said = taken(make, needed, **{field: other})
    held = value(run, field)
    assert held == other or held["name"] == other
    (line,) = about(said, field)
    assert NAME in line and str(other) in line
    if own:
        _, said = taken(make, needed, **{field: own})
        assert not about(said, field), "it is the same"


BOUND: list[tuple[Make, str, Any, Any]] = [
    (prepared, "forward_process", "gaussian", tiny_tokens.PROCESS),
    (prepared, "label_column", None, "label"),
    (prepared, "caption_column", None, "text"),
    (prepared, "condition_dropout", 0.1, 0.2),
    (kinds.hvae, "num_levels", LEVELS, 9),
    (kinds.latent, "num_levels", LEVELS, 9),
    (classes, "caption_column", None, "text"),
    (classes, "condition_dropout", 0.1, 0.0),
    (lambda: classes(0.0), "condition_dropout", 0.0, 0.1),
    (tokens, "time_embedding", False, True),
    (timed, "time_embedding", True, False),
]


@pytest.mark.parametrize(("make", "field", "own", "other"), BOUND, ids=lambda one: one if isinstance(one, str) else "")
def test_what_the_weights_are_bound_to_is_refused(make: Make, field: str, own: Any, other: Any) -> None:
    shown = other["name"] if isinstance(other, dict) else other
    with pytest.raises(ConfigurationError, match=naming(field, shown, NAME)):
        taken(make, {}, **{field: other})
    if own is not None:
        run, said = taken(make, {}, **{field: own})
        assert value(run, field) == own and not said


@pytest.mark.parametrize("field", ["caption_template", "text_encoder"])
@pytest.mark.parametrize("make", [prepared, classes])
def test_captions_are_told_to_no_network_that_takes_none(make: Make, field: str) -> None:
    """Both fields need another, which the recipe has by itself here, and which is not taken."""
    others = {"label_column": "label", "caption_template": "a {label}", "text_encoder": "somewhere"}
    with pytest.raises(ConfigurationError, match=naming(field, others[field], NAME)):
        taken(make, others, **{field: others[field]})
    run, said = taken(make, others)
    assert run.data.caption_template is None and run.model.text_encoder is None
    assert {line.split()[0] for line in said} == set(others) - ({"label_column"} if make is classes else set())


# ---- networks ---------------------------------------------------------------------------------------------------

NETWORKS: list[tuple[Make, str, dict[str, Any], dict[str, Any]]] = [  # what is its own, and what is not
    (prepared, "unet", {"block_out_channels": [8]}, {"block_out_channels": [16]}),
    (prepared, "unet", {"_class_name": "UNetVDMModel"}, {"_class_name": "UNet2DModel"}),
    (kinds.hvae, "hvae", {"latent_shapes": [[4]]}, {"latent_shapes": [[5]]}),
    (kinds.latent, "unet", {"in_channels": 2}, {"in_channels": 3}),
    (kinds.latent, "first_stage", {"latent_shapes": [[2, 4, 4]]}, {"latent_shapes": [[3, 4, 4]]}),
    (kinds.latent, "first_stage", {"_class_name": "MarkovianHVAE"}, {"_class_name": "AutoencoderKL"}),
    (of_autoencoder_kl, "first_stage", {"latent_channels": 1, "_class_name": "AutoencoderKL"}, {"latent_channels": 2}),
    (of_autoencoder_kl, "first_stage", {"norm_num_groups": 4}, {"_class_name": "MarkovianHVAE"}),
    (tokens, "network", {"hidden_size": 8}, {"hidden_size": 16}),
    (tokens, "network", {"_class_name": "BertForMaskedLM"}, {"_class_name": "RobertaForMaskedLM"}),
]


@pytest.mark.parametrize(("make", "field", "own", "other"), NETWORKS)
def test_a_network_is_the_models_own(make: Make, field: str, own: dict[str, Any], other: dict[str, Any]) -> None:
    run, said = taken(make, {}, **{field: own})
    assert value(run, field) == {} and not about(said, field)
    run, said = taken(make, {field: other})
    assert value(run, field) == {} and len(about(said, field)) == 1 and NAME in said[0]
    ((key, wanted),) = other.items()
    with pytest.raises(ConfigurationError, match=naming(f"{field}.{key}", str(wanted), NAME)):
        taken(make, {}, **{field: other})


def test_the_package_of_a_network_is_no_argument_of_it() -> None:
    run, said = taken(prepared, {})
    assert run.model.unet == "{}" and said == []
    assert about(taken(kinds.latent, {"scale_latents": False})[1], "scale_latents")
    assert not about(taken(kinds.latent, {"scale_latents": True})[1], "scale_latents")


def test_another_kind_of_model_is_refused_by_both() -> None:
    chosen = Configuration.from_dict(
        {"max_train_steps": 1, "dataset_name": "digits", "init_from": NAME, "model": "hvae"}, asked={}
    )
    for make, kind in ((prepared, "vdm"), (kinds.latent, "latent_vdm")):
        with pytest.raises(ConfigurationError, match=naming("hvae", kind, type(make()).__name__)):
            take_over(chosen, make(), NAME)


# ---- conditions -------------------------------------------------------------------------------------------------


def test_the_column_of_classes_is_the_recipes_where_it_has_one() -> None:
    assert taken(classes, {})[0].data.label_column == "digit"
    run, said = taken(classes, {"label_column": "label"})
    assert run.data.label_column == "label" and said == []
    assert taken(classes, {}, label_column="label")[0].data.label_column == "label"
    assert taken(lambda: classes(0.0), {"condition_dropout": 0.3})[0].model.condition_dropout == 0


def columns(configuration: Configuration) -> tuple[str | None, ...]:
    data = configuration.data
    return data.caption_column, data.label_column, data.caption_template


def test_captions_are_found_by_column_or_template() -> None:
    """The model's own, but for what the recipe says whole."""
    by_template: Make = lambda: captions("a {label}")  # noqa: E731
    encoder = {"text_encoder": "somewhere"}
    assert columns(taken(captions, {})[0]) == ("words", None, None)
    assert columns(taken(by_template, {})[0]) == (None, "label", "a {label}")
    for make in (captions, by_template):
        assert columns(taken(make, {"caption_column": "text"} | encoder)[0])[0] == "text"
        whole = {"label_column": "class", "caption_template": "the {label}"}
        assert columns(taken(make, whole | encoder)[0]) == (None, "class", "the {label}")
    assert columns(taken(by_template, {"label_column": "class"})[0]) == (None, "class", "a {label}")
    assert columns(taken(by_template, {}, label_column="class")[0]) == (None, "class", "a {label}")
    with pytest.raises(ConfigurationError, match=naming("label_column", "class", NAME)):
        taken(captions, {}, label_column="class")


def test_an_encoder_is_the_models_own_where_it_has_one() -> None:
    given = {"text_encoder": "somewhere", "caption_column": "text"}
    run, said = taken(captions, given)
    assert run.model.text_encoder is None and len(about(said, "text_encoder")) == 1
    run, said = taken(captions, {}, **given)
    assert run.model.text_encoder == "somewhere"
    run, said = taken(lambda: captions(with_encoder=False), given)
    assert run.model.text_encoder == "somewhere" and not about(said, "text_encoder")


# ---- the process ------------------------------------------------------------------------------------------------


def ends(asked: Any, make: Make = prepared) -> dict[str, Any]:
    form = value(taken(make, {}, noise_schedule=asked)[0], "noise_schedule")
    assert set(form) == {"name", "config"}
    return dict(form["config"])


def test_a_schedule_that_is_asked_for_goes_from_end_to_end_of_the_models() -> None:
    assert ends("cosine") == pytest.approx({"gamma_min": -7.5, "gamma_max": 4.0})
    assert ends({"name": "cosine", "config": {"gamma_max": 3.0}}) == pytest.approx({"gamma_min": -7.5, "gamma_max": 3})
    given = {"gamma_min": -6.0, "gamma_max": 3.0}
    assert ends({"name": "cosine", "config": given}) == given
    tabulated = {"name": "tabulated", "config": {"gammas": [-8.0, -1.0, 5.0]}}
    assert ends(tabulated) == tabulated["config"], "one without ends of its own stays as it is"


def test_so_does_one_of_a_plugin_and_one_of_another_kind_has_no_ends_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_pixelwise(tmp_path / "fakes"))
    entry = "[vdm_hub.noise_schedules]\npixelwise = plugin_of_law_7:ContextSchedule\n"
    monkeypatch.syspath_prepend(write_metadata(tmp_path / "of another", "others", "1", entry))
    pixelwise = {"name": "pixelwise", "config": {"size": 8}, "package": "fakes"}
    found = value(taken(prepared, {}, noise_schedule=pixelwise)[0], "noise_schedule")
    assert found == pixelwise | {"config": {"size": 8, "gamma_min": -7.5, "gamma_max": 4.0}}
    made = taken(lambda: tiny_pipeline(noise_schedule=pixelwise), {}, noise_schedule="cosine")[0]
    assert value(made, "noise_schedule") == "cosine"


def test_a_sampler_of_diffusers_changes_no_process() -> None:
    def sampled() -> VDMPipeline:
        pipe = prepared()
        pipe.scheduler = pipe.scheduler.to_diffusers(UniPCMultistepScheduler)
        return pipe

    plain, swapped = (taken(make, {}) for make in (prepared, sampled))
    assert plain[0].diffusion == swapped[0].diffusion and plain[1] == swapped[1] == []


def form(name: str, package: str | None = None, **config: Any) -> dict[str, Any]:
    made = {"name": name} | ({"config": config} if config else {})
    return made | ({} if package is None else {"package": package})


@pytest.mark.parametrize(
    ("field", "given", "own", "is_so"),
    [
        ("noise_schedule", "linear", form("linear"), False),
        ("noise_schedule", "linear", RANGE, False),  # a name alone means whatever arguments it has
        ("noise_schedule", RANGE, "linear", True),  # which has its defaults
        ("noise_schedule", RANGE, RANGE, False),
        ("noise_schedule", form("linear", gamma_min=-13.3), "linear", False),
        ("noise_schedule", "linear", form("linear", gamma_min=-13.3), False),
        ("noise_schedule", form("discrete_betas", betas=[0.1, 0.2]), "discrete_betas", True),
        ("noise_schedule", "discrete_betas", form("discrete_betas", betas=[0.1, 0.2]), False),
        ("noise_schedule", form("linear", gamma_min=-13.3, gamma_max=4.0), RANGE, True),
        ("noise_schedule", form("linear", gamma_max=5.0), form("linear", gamma_min=-13.3), False),
        ("noise_schedule", form("linear", gamma_max=6.0), form("linear", gamma_min=-13.3), True),
        ("noise_schedule", "linear", "cosine", True),
        ("noise_schedule", form("linear", "vdm-hub"), "linear", False),
        ("noise_schedule", "linear", form("linear", "vdm-hub"), False),
        ("noise_schedule", form("linear", "vdm-hub-other"), "linear", True),
        ("conditioning", form("affine", a=(1, 2)), form("affine", a=[1, 2]), False),
        ("conditioning", form("affine", a=1), form("affine", a=2), True),
        ("data_scaling", "full", "unit", True),
        ("data_scaling", "full", "full", False),
        ("data_scaling", None, "full", False),  # it is not said
        ("conditioning", "affine", None, True),
    ],
)
def test_what_is_given_differs_where_it_means_something_else(field: str, given: Any, own: Any, is_so: bool) -> None:
    assert differs(field, given, own) is is_so


def test_a_long_table_is_named_and_a_short_one_written_out() -> None:
    short = {"name": "discrete_betas", "config": {"betas": [0.1, 0.2, 0.3]}}
    assert value(taken(lambda: tiny_pipeline(noise_schedule=short), {})[0], "noise_schedule") == short
    assert taken(lambda: tiny_pipeline(noise_schedule=TABLE), {})[0].diffusion.noise_schedule == "discrete_betas"
    assert defaults()["noise_schedule"] != "discrete_betas"
