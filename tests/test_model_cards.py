"""The finished cards in ``model_cards/`` are what `vdm-hub publish` makes of the records beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from vdm_hub.errors import ConfigurationError
from vdm_hub.publishing.card import Edition, render_card
from vdm_hub.publishing.contents import PICTURES, Contents
from vdm_hub.publishing.stock_twin import build_stock_twin
from vdm_hub.recipes.arguments import Configuration, parse_recipe
from vdm_hub.training.parts.setup import build_objective, build_pipeline

CARDS = sorted((Path(__file__).resolve().parents[1] / "model_cards").iterdir())


def record(card: Path, name: str) -> Any:
    return json.loads((card / name).read_text())


def test_there_is_the_card_of_the_digits() -> None:
    assert "vdm-digits" in {card.name for card in CARDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_figures_are_those_that_were_measured(card: Path) -> None:
    evaluation, loaded = record(card, "evaluation.json"), ModelCard.load(card / "README.md")
    results = {result.metric_type: result.metric_value for result in loaded.data.eval_results}
    assert results.pop("bits_per_dim") == pytest.approx(evaluation["bits_per_dim"], abs=1e-6)
    assert results == pytest.approx({f"bits_per_dim_{k}": v for k, v in evaluation["terms"].items()}, abs=1e-6)
    assert f"| **total** | **{evaluation['bits_per_dim']:.4f}** |" in loaded.text
    assert f"| standard error, Monte Carlo | {evaluation['standard_error']:.4f} |" in loaded.text


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_picture_and_file_that_it_links_is_there(card: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", (card / "README.md").read_text())
    assert {"images/samples.png", "images/schedule.png", "images/training_curve.png", "recipe.yaml"} <= set(links)
    assert all((card / link).is_file() for link in links)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_its_recipe_is_the_one_that_is_shipped(card: Path) -> None:
    published = Configuration.from_dict(yaml.safe_load((card / "recipe.yaml").read_text())).to_dict()
    shipped = parse_recipe([card.name.removeprefix("vdm-")]).to_dict()
    differing = {key for key in shipped if shipped[key] != published[key]}
    # where a run writes and reports is no part of the recipe
    assert differing <= {"recipe", "output_dir", "resume_from_checkpoint", "report_to"}


def rendered(card: Path) -> str:
    """The card as it is made today; of the model it needs the shape alone, so untrained weights will do."""
    recipe = yaml.safe_load((card / "recipe.yaml").read_text())
    records = [record(card, f"{name}.json") for name in ("evaluation", "history", "run")]
    source = Contents(card, recipe, *records, {name: card / "images" / name for name in PICTURES})
    pipeline = build_pipeline(build_objective(Configuration.from_dict(recipe), tuple(records[0]["dataset"]["shape"])))
    with pytest.raises(ConfigurationError) as no_twin:
        build_stock_twin(pipeline)
    edition = Edition(f"me/{card.name}", license="apache-2.0", no_twin=str(no_twin.value), remote_code="remote-code")
    return render_card(source, pipeline, edition)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_text_is_what_the_package_renders(card: Path) -> None:
    assert (card / "README.md").read_text() == rendered(card)
