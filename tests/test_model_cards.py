"""The finished cards in ``model_cards/`` are what `vdm-hub publish` makes of the records beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from vdm_hub.training.arguments import Configuration, parse

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
    shipped = parse([card.name.removeprefix("vdm-")]).to_dict()
    differing = {key for key in shipped if shipped[key] != published[key]}
    # where a run writes and reports is no part of the recipe
    assert differing <= {"recipe", "output_dir", "resume_from_checkpoint", "report_to"}
