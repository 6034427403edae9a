"""The model ``vdm_hub`` of lm-evaluation-harness, by its own command line: its figures are those of the pipeline."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
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
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.lm_eval.__main__ import register

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
    found = importlib.util.find_spec("lm_eval")
    beside = [] if found is None or found.origin is None else [str(Path(found.origin).parents[1])]
    places = os.pathsep.join([str(ROOT), str(home / "site-packages"), *beside])
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


# ---- the model itself, asked without the harness's command line -----------------------------------------------------


def model(home: Path, **arguments: Any) -> Any:
    from lm_eval.api.registry import get_model

    register()
    return get_model("vdm_hub")(pretrained=str(home / "pipeline"), **{"replicates": 2} | arguments)


def asked(kind: str, *arguments: tuple[Any, ...], task: str = "t") -> list[Any]:
    """Requests as the harness makes them, each of a document of its own."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=words, idx=0, metadata=(task, number, 1))
        for number, words in enumerate(arguments)
    ]


@needs_harness
@pytest.mark.filterwarnings("error")
def test_no_text_has_no_likelihood_to_pay_for(home: Path) -> None:
    asks = model(home)
    assert asks.loglikelihood_rolling([]) == [] and asks.loglikelihood_rolling(asked("r", ("",))) == [0]
    assert asks.get_model_info()["vdm_hub"]["loglikelihood_rolling"]["bits_per_byte"] is None


@needs_harness
@pytest.mark.parametrize("lost", ["é", "héllo ☃"])
def test_texts_that_tokens_do_not_say_have_no_figure_that_the_harness_could_take_for_theirs(
    home: Path, lost: str
) -> None:
    """Of a document the harness makes bits by byte and word itself: it is refused, before anything is measured."""
    asks = model(home)
    with pytest.raises(DataError, match=r"1 of 2 texts.*document 1 of the task t.*Take these texts out"):
        asks.loglikelihood_rolling(asked("loglikelihood_rolling", ("a bad cab",), (lost,)))
    assert not asks.answers and "loglikelihood_rolling" not in asks.get_model_info()["vdm_hub"]


@needs_harness
def test_a_continuation_that_tokens_do_not_say_is_marked_and_takes_the_bits_by_byte(
    home: Path, tmp_path: Path
) -> None:
    asks = model(home, errors=str(tmp_path / "errors.jsonl"))
    asks.loglikelihood(asked("loglikelihood", ("a bad ", "cab"), ("a b", "é"), ("ü", "bag")))
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [line["whole"] for line in lines] == [True, False, True]
    said = asks.get_model_info()["vdm_hub"]["loglikelihood"]
    assert (said["texts_not_whole"], said["bits_per_byte"], said["bits_per_byte_standard_error"]) == (1, None, None)
    notes = " ".join(said["notes"])
    assert "1 of 7 characters" in notes and "characters of the contexts" in notes
    asks.loglikelihood(asked("loglikelihood", ("a bad ", "cab")))
    assert asks.get_model_info()["vdm_hub"]["loglikelihood"]["bits_per_byte"] > 0


@needs_harness
def test_a_context_without_room_is_said_not_to_be_given(home: Path) -> None:
    asks, text = model(home), "abcdefgabc"
    (answer,) = asks.loglikelihood(asked("loglikelihood", ("fed a gab", text)))
    assert answer[0] == asks.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))[0]
    (note,) = asks.get_model_info()["vdm_hub"]["loglikelihood"]["notes"]
    assert "nothing was given" in note


@needs_harness
def test_samples_are_draws_of_their_own_that_come_again_and_likeliest_texts_are_the_same(home: Path) -> None:
    options = {"until": [], "max_gen_toks": 24, "do_sample": True, "temperature": 1.0}
    asks = model(home, num_inference_steps=4)
    (one,) = asked("generate_until", ("fed", options))
    drawn = asks.generate_until([one, one, *asked("generate_until", ("fed", options), task="u")])
    assert len(set(drawn)) == 3 and drawn == asks.generate_until(
        [one, one, *asked("generate_until", ("fed", options), task="u")]
    )
    likeliest = asks.generate_until(asked("generate_until", *[("fed", {"until": [], "max_gen_toks": 8})] * 2))
    assert len(set(likeliest)) == 1


@needs_harness
@torch.no_grad()
def test_the_parts_of_a_text_are_draws_of_their_own(home: Path) -> None:
    """Half a window at a time, of a network to which all letters are alike: the same draws would be the same text."""
    asks = model(home, num_inference_steps=4)
    for weight in asks.pipeline.network.parameters():
        torch.nn.init.zeros_(weight)
    asks.pipeline.network.cls.predictions.bias[len(tiny_tokens.LETTERS) :] = -100
    options = {"until": [], "max_gen_toks": 40, "do_sample": True, "temperature": 1.0}
    (text,) = asks.generate_until(asked("generate_until", ("fed", options)))
    half = tiny_tokens.LENGTH // 2
    parts = [text[start : start + half] for start in range(0, 40, half)]
    assert len(text) == 40 and len(set(parts)) > len(parts) // 2


@needs_harness
@torch.no_grad()
def test_the_likeliest_continuation_is_opened_from_left_to_right(home: Path, pipe: TokenPipeline) -> None:
    """An exact oracle: the network itself, a token at a time, the others masked."""
    words, called = pipe.tokenization, pipe.token_network()
    context, found = "fed", list[int]()
    for left in range(4, 0, -1):
        seen = torch.tensor([[*words.encode(context).levels.tolist(), *found, *[words.num_values] * left]])
        found.append(int(called(seen, torch.zeros(1))[0][0, len(context) + len(found)].argmax()))
    likeliest = words.decode(found)
    others = {likeliest[:place] + letter + likeliest[place + 1 :] for place in range(4) for letter in "ab"} - {
        likeliest
    }
    for size in (1, 3, 32):
        asks = model(home, greedy=True, batch_size=size, replicates=1)
        said = asks.loglikelihood(
            asked("loglikelihood", (context, likeliest), *[(context, other) for other in others])
        )
        assert [greedy for _, greedy in said] == [True] + [False] * len(others)
    unsure = asks.loglikelihood(asked("loglikelihood", (context, "é"), (context, "abcdefgab"), (context, "")))
    assert [greedy for _, greedy in unsure] == [False, False, True]


@needs_harness
def test_generated_texts_say_what_of_their_contexts_was_not_given(home: Path) -> None:
    asks, options = model(home, num_inference_steps=2), {"until": [], "max_gen_toks": 2}
    asks.generate_until(asked("generate_until", ("fé", options), ("a bad cab faced", options), ("a", options)))
    first, second = asks.get_model_info()["vdm_hub"]["generate_until"]["notes"]
    assert "1 of 18 characters" in first and "1 of 3 contexts" in second


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"errors": "/nonexistent/x.jsonl"}, "x.jsonl"),
        ({"batch_size": "x"}, "batch_size is 'x'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "nope"}, "nope"),
        ({"greedy": "perhaps"}, "greedy is 'perhaps'"),
        ({"replicate": 4}, "replicates"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_measured(
    home: Path, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(named)):
        model(home, **arguments)


@needs_harness
def test_half_of_a_pair_of_surrogates_is_refused_in_every_request(home: Path) -> None:
    asks, options = model(home), {"until": [], "max_gen_toks": 2}
    for kind, words in {
        "loglikelihood_rolling": ("\ud800",),
        "loglikelihood": ("\ud800", "a"),
        "generate_until": ("\ud800", options),
    }.items():
        with pytest.raises(DataError, match="ud800"):
            getattr(asks, kind)(asked(kind, words))


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
