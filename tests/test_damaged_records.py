"""Damaged records, recipes, checkpoints and journals: a paragraph of ours, or what was written; nothing else."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.damage import LEAVES, damaged_bytes, damaged_header, damaged_json
from hub.publications import write_run
from hub.test_fuzz import QUIET, Door, refused_or_loaded
from vdm_hub.evaluation.journal import Journal
from vdm_hub.likelihood.measurement import Measured, Results
from vdm_hub.publishing.contents import read_contents
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.state.checkpoints import load_checkpoint, save_checkpoint

RECIPE = {"dataset_name": "digits", "num_levels": 17, "max_train_steps": 3, "unet": {"layers_per_block": 1}, "seed": 1}
KEY = {"weights": "sha256:0", "method": "bound"}


def journal_of(folder: Path) -> list[float]:
    """What a journal holds, as an evaluation that goes on reads it."""
    results = Results(4)
    journal = Journal(folder / "journal", KEY)
    journal.read(results)
    found = [] if journal.state is None else [journal.state["evaluations"]]
    return [*found, *results.totals([0]).flatten().tolist()]


DOORS: dict[str, Door] = {
    "run": Door("read_contents", lambda folder: read_contents(folder / "run")),
    "recipe": Door("parse_recipe", lambda folder: parse_recipe([str(folder / "recipe.yaml")])),
    "checkpoint": Door("load_checkpoint", lambda folder: load_checkpoint(folder / "step-00000003")),
    "journal": Door("Journal", journal_of),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    write_run(folder / "run" / "run")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    tensors = {"objective": {"a": torch.arange(3.0)}, "ema": {"a": torch.ones(3)}}
    save_checkpoint(folder / "checkpoint", 3, tensors, {"step": 3, "history": {"train": {"step": [1]}}})
    journal = Journal(folder / "journal" / "journal", KEY)
    journal.keep_state({"state": {"proposal": [0.5, 0.5]}, "evaluations": 7})
    for replicate in (0, 1):
        terms = {"prior": torch.arange(4.0) + replicate, "diffusion": torch.ones(4)}
        journal.write(replicate, torch.arange(4), Measured(terms), seconds=0.5)
    return folder


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    yield found
    print(f"\n{sum(found.values())} damaged records: {dict(found.most_common())}")


@st.composite
def damaged_yaml(draw: st.DrawFn, content: bytes) -> bytes:
    """A recipe with another value, a key too many, or other bytes."""
    if draw(st.booleans()):
        return draw(damaged_bytes(content))
    values: dict[str, Any] = yaml.safe_load(content)
    key = draw(st.sampled_from([*values, "learning_rate", "resolution", "noise_schedule", "output_dir", "nope"]))
    odd = [
        "010",
        "1:30",
        "1_000",
        "*a",
        "&a [*a]",
        "!!python/object:os.system x",
        "<<: {}",
        ".nan",
        "1e400",
        "\u202ex",
    ]
    text = yaml.safe_dump({k: v for k, v in values.items() if k != key})
    value = draw(st.one_of(st.sampled_from(odd), st.sampled_from(LEAVES).map(json.dumps)))
    return f"{text}{key}: {value}\n".encode()


def try_one(kind: str, sound: Path, draw: Any, counts: Counter[str]) -> None:
    place = sound.with_name(f"{sound.name}-{kind}")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound / kind, place)
    suffixes = (".json", ".safetensors", ".yaml")
    records = [path for path in sorted(place.rglob("*")) if path.suffix in suffixes and "pipeline" not in path.parts]
    chosen = draw(st.sampled_from(records))
    damage = {".json": damaged_json, ".safetensors": damaged_header, ".yaml": damaged_yaml}[chosen.suffix]
    before = chosen.read_bytes()
    chosen.write_bytes(draw(damage(before)))
    outcome = refused_or_loaded(DOORS[kind], place)
    counts[f"{kind} {outcome}"] += 1
    if outcome == "loaded" and kind in ("checkpoint", "journal") and chosen.read_bytes() != before:
        # Only what says the same in other words may pass: another order of keys, or the same number.
        loaded, expected = (DOORS[kind].load(path) for path in (place, sound / kind))
        assert str(loaded) == str(expected)


@pytest.mark.parametrize("kind", sorted(DOORS))
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_a_damaged_record_is_refused_in_one_paragraph(
    kind: str, sound: Path, counts: Counter[str], data: st.DataObject
) -> None:
    try_one(kind, sound, data.draw, counts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(DOORS))
@given(data=st.data())
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
def test_a_damaged_record_is_refused_however_often_it_is_tried(
    kind: str, sound: Path, counts: Counter[str], data: st.DataObject
) -> None:
    try_one(kind, sound, data.draw, counts)


@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_no_bit_of_a_journal_s_piece_changes_a_figure_unseen(bit: int, sound: Path, tmp_path: Path) -> None:
    """Every sixteenth byte of a piece, one bit flipped: refused, or nothing changed."""
    shutil.copytree(sound / "journal", tmp_path / "j")
    expected = journal_of(tmp_path / "j")
    piece = min((tmp_path / "j" / "journal").glob("replicate-*"))
    whole = piece.read_bytes()
    for at in range(0, len(whole), 16):
        piece.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        if refused_or_loaded(DOORS["journal"], tmp_path / "j") == "loaded":
            assert journal_of(tmp_path / "j") == expected
