"""The model ``vdm_hub`` of lm-evaluation-harness, by its own command line: its figures are those of the pipeline."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny_tokens
from runs import ROOT, environment
from vdm_hub import TokenPipeline
from vdm_hub.data.tokenization import END, UNKNOWN

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the package lm-eval is not installed, so nothing of the harness is tested: pip install lm-eval",
)
TEXTS = ["a bad cab faced a bag", "fed a gab", "face"]
PAIRS = [("a bad ", "cab"), ("a bad ", "bag"), ("", "fed a gab"), ("gabbed face a ", "cab")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pipeline, a process that is installed, and three tasks over files that are there."""
    folder = tmp_path_factory.mktemp("harness")
    plugin = tiny_tokens.install(folder / "site-packages")
    usual = {"dataset_path": "json", "test_split": "test"}
    rows = {
        "rolling": [{"text": text} for text in TEXTS],
        "choices": [{"context": context, "text": text, "choices": [text, "fed"]} for context, text in PAIRS],
        "written": [{"text": text} for text in TEXTS],
    }
    tasks: dict[str, dict[str, Any]] = {
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "written": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "a",
            "generation_kwargs": {"until": ["b"], "max_gen_toks": 10},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]))
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **usual, "dataset_kwargs": files, **task}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(plugin)
        tiny_tokens.pipeline().save_pretrained(folder / "pipeline")
        yield folder


def harness(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(ROOT), str(home / "site-packages")])
    variables = environment(PYTHONPATH=places, HF_HOME=str(home / "cache"), HF_DATASETS_OFFLINE="1")
    command = [sys.executable, "-m", "vdm_hub.lm_eval", *words]
    return subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def results(home: Path) -> dict[str, Any]:
    """What the harness wrote of all three tasks, and the lines with the errors."""
    model = "pretrained=pipeline,replicates=4,num_inference_steps=4,greedy=true,errors=errors.jsonl"
    said = harness(
        home,
        *("--model", "vdm_hub", "--model_args", model, "--batch_size", "16", "--include_path", "."),
        *("--tasks", "rolling,choices,written", "--output_path", "out", "--log_samples"),
    )
    assert said.returncode == 0, said.stderr[-4000:]
    (found,) = (home / "out").rglob("results*.json")
    samples = {
        name: [json.loads(line) for line in next((home / "out").rglob(f"samples_{name}_*")).read_text().splitlines()]
        for name in ("rolling", "choices", "written")
    }
    errors = [json.loads(line) for line in (home / "errors.jsonl").read_text().splitlines()]
    return json.loads(found.read_text()) | {"samples": samples, "errors": errors, "said": said.stderr}


@pytest.fixture(scope="module")
def pipe(home: Path) -> TokenPipeline:
    loaded = TokenPipeline.from_pretrained(home / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@needs_harness
def test_the_rolling_figure_is_the_pipelines_own_with_its_error(results: dict[str, Any], pipe: TokenPipeline) -> None:
    report = pipe.log_likelihood(TEXTS, replicates=4)
    assert results["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(report.bits_per_byte, rel=1e-9)
    said = results["config"]["vdm_hub"]["loglikelihood_rolling"]
    assert said["bits_per_byte"] == pytest.approx(report.bits_per_byte, rel=1e-9)
    assert said["bits_per_byte_standard_error"] == pytest.approx(report.leading_error, rel=1e-9)
    assert said["bytes"] == sum(map(len, TEXTS)) and "bits_per_byte_standard_error" in results["said"]


@needs_harness
def test_a_continuation_is_scored_after_its_context(results: dict[str, Any], pipe: TokenPipeline) -> None:
    asked = [(context, text) for context, own in PAIRS for text in (own, "fed")]
    report = pipe.log_likelihood([text for _, text in asked], replicates=4, contexts=[before for before, _ in asked])
    nats = torch.stack(list(report.terms_per_image.values())).sum(0)
    parts = torch.stack([part.sum(1) for part in nats.split(report.details["windows_of_texts"], 1)], 1)
    rows = [row for row in results["errors"] if row["task"] == "choices"]
    order = sorted(range(len(rows)), key=lambda place: (rows[place]["doc_id"], rows[place]["idx"]))
    assert [rows[place]["log_likelihood"] for place in order] == pytest.approx((-parts.mean(0)).tolist(), rel=1e-9)
    errors = (parts.std(0) / math.sqrt(4)).tolist()
    assert [rows[place]["standard_error"] for place in order] == pytest.approx(errors, rel=1e-9)
    scored = [float(one[0]) for row in results["samples"]["choices"] for one in row["filtered_resps"]]
    assert sorted(scored) == pytest.approx(sorted(row["log_likelihood"] for row in rows), rel=1e-9)


@needs_harness
def test_texts_are_written_up_to_the_first_word_to_stop_at(results: dict[str, Any]) -> None:
    written = [row["resps"][0][0] for row in results["samples"]["written"]]
    assert len(written) == len(TEXTS) and not any("b" in text for text in written)
    assert all(len(text.replace(UNKNOWN, "?")) <= 10 and END not in text for text in written)


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("pretrained=nowhere/at-all", "nowhere"),
        ("pretrained=pipeline,replicates=0", "replicates"),
        ("pretrained=pipeline,method=guess", "guess"),
    ],
)
def test_what_can_not_be_answered_is_one_line(home: Path, arguments: str, named: str) -> None:
    done = harness(home, "--model", "vdm_hub", "--model_args", arguments, "--include_path", ".", "--tasks", "rolling")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and named in last


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness_its_package_is_named(tmp_path: Path) -> None:
    done = harness(tmp_path, "--help")
    assert done.returncode == 2 and "pip install lm-eval" in done.stderr and done.stderr.count("\n") == 1
