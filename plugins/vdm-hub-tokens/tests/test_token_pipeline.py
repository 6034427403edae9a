"""Both processes in a `TokenPipeline`: samples, filled holes, every likelihood, saved and loaded."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from naming import naming
from runs import train_here, vdm_hub_here
from tiny_tokens import LENGTH, network, run_fields, tokenizer
from vdm_hub import ConfigurationError, LikelihoodMethod, TokenPipeline, VariationalBound, VDMScheduler
from vdm_hub_tokens import AbsorbingProcess, ExactOrder, MaskedCounts, WeightedOrders

TEXTS = ["abc def", "gab", "fed cab bag face"]
both = pytest.mark.parametrize("name", ["absorbing", "uniform"])


def pipeline(name: str, context: int = 0, **config: float) -> TokenPipeline:
    words = tokenizer()
    process = {"name": name, "package": "vdm-hub-tokens", "config": {"schedule": "polynomial"} | config}
    scheduler = VDMScheduler(num_levels=len(words) - 1, forward_process=process)
    windows = {"length": LENGTH, "context": context, "text_column": "text"}
    made = TokenPipeline(network(len(words)), words, scheduler, windows=windows)
    made.set_progress_bar_config(disable=True)
    return made


@both
def test_what_is_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    first = pipeline(name, context=3)
    first.save_pretrained(tmp_path)
    second = TokenPipeline.from_pretrained(tmp_path)
    second.set_progress_bar_config(disable=True)
    drawn = [one(3, num_inference_steps=4, generator=torch.Generator().manual_seed(0)) for one in (first, second)]
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    for method in (VariationalBound(), VariationalBound(5)):
        reports = [one.log_likelihood(TEXTS, method, replicates=3) for one in (first, second)]
        assert reports[0].bits_per_dim == reports[1].bits_per_dim > 0 and reports[0].is_bound


@both
def test_holes_are_filled_and_the_rest_is_kept(name: str) -> None:
    pipe = pipeline(name)
    prompt = [int(one) for one in pipe.tokenizer("abcdefg ", add_special_tokens=False)["input_ids"]]
    holes = [None if place in (2, 5) else one for place, one in enumerate(prompt)]
    found = pipe(40, prompt=holes, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).ids
    kept = [place for place, one in enumerate(holes) if one is not None]
    assert torch.equal(found[:, kept], torch.tensor(prompt)[kept].expand(40, -1))
    assert len(found[:, 2].unique()) > 1 and int((found == pipe.tokenizer.mask_token_id).sum()) == 0


@pytest.mark.parametrize("context", [0, 3])
def test_every_likelihood_is_reported(context: int) -> None:
    pipe = pipeline("absorbing", context)
    methods: dict[str, LikelihoodMethod | str] = {
        "bound": VariationalBound(times_per_datum=4),
        "counts": MaskedCounts(counts_per_text=4),
        "by name": "masked_counts",
        "one order": WeightedOrders(draws=1),
        "weighted": WeightedOrders(draws=16),
        "left to right": ExactOrder(),
        "confident": ExactOrder("most_confident", opened_at_once=2),
    }
    reports = {name: pipe.log_likelihood(TEXTS, method, replicates=12) for name, method in methods.items()}
    for name, report in reports.items():
        exact = name in ("left to right", "confident")
        assert report.is_bound is not exact and report.bits_per_dim > 0
        assert (report.standard_error < 1e-12) is exact
        assert ("another model" in str(report)) is exact
    bound = reports["bound"]
    for name in ("counts", "by name", "one order"):
        error = (bound.standard_error**2 + reports[name].standard_error ** 2) ** 0.5
        assert abs(reports[name].bits_per_dim - bound.bits_per_dim) < 4.5 * error
    assert reports["weighted"].bits_per_dim < reports["one order"].bits_per_dim


def test_remasking_is_an_option_of_a_call() -> None:
    """With it the pipeline draws what one whose process has it draws, and what is open is masked again on the way."""
    pipe, own, masked = pipeline("absorbing"), pipeline("absorbing", remasking=0.5), []

    def drawn(which: Any, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        return which(num_samples=8, num_inference_steps=12, generator=generator, **more).ids

    def count(pipe: Any, step: int, timestep: Any, seen: Any) -> None:
        masked.append((seen["latents"] == pipe.process.mask_id).clone())

    assert torch.equal(drawn(pipe, remasking=0.5, callback_on_step_end=count), drawn(own))
    assert torch.equal(drawn(pipe, remasking=0.0), drawn(pipe)) and not torch.equal(drawn(own), drawn(pipe))
    assert any(bool((later & ~before).any()) for before, later in itertools.pairwise(masked))
    assert "remasking=0.5" in repr(own.process)
    for which, share in ((pipe, 1.5), (pipeline("uniform"), 0.5)):
        with pytest.raises(ConfigurationError, match=naming("remasking", share)):
            drawn(which, remasking=share)


def test_remasking_is_the_samplers() -> None:
    pipe = pipeline("absorbing", remasking=0.5)
    process = pipe.process
    assert isinstance(process, AbsorbingProcess) and process.remasking == 0.5
    texts = pipe(4, num_inference_steps=12, generator=torch.Generator().manual_seed(0)).texts
    assert all(len(text) > 0 for text in texts)
    for method in (VariationalBound(), MaskedCounts()):
        with pytest.raises(ConfigurationError, match=naming("remasking", "transitions")):
            pipe.log_likelihood(TEXTS, method)
    plain = pipeline("absorbing").log_likelihood(TEXTS, VariationalBound(12), replicates=32)
    ours = pipe.log_likelihood(TEXTS, VariationalBound(12), replicates=32)
    assert ours.bits_per_dim > plain.bits_per_dim + 4 * (ours.standard_error + plain.standard_error)


def test_a_likelihood_is_by_counts_unless_another_is_named() -> None:
    pipe = pipeline("absorbing")
    assert pipe.log_likelihood("to be or not").method == "masked_counts"
    assert pipe.log_likelihood("to be or not", "bound").method == "bound"


MEASURED: dict[str, tuple[list[str], str]] = {
    "the bound": (["--method", "bound"], "continuous time"),
    "a bound of transitions": (["--transitions", "3"], "3 transitions"),
    "the usual one": ([], "continuous time"),
    "a method's options": (
        ["--method", '{"name": "masked_counts", "config": {"counts_per_text": 2}}'],
        "continuous time",
    ),
    "an order": (
        ["--method", '{"name": "exact_order", "config": {"rule": "most_confident", "opened_at_once": 3}}'],
        "steps of 3 sites",
    ),
    "whole orders": (["--method", '{"name": "weighted_orders", "config": {"draws": 2}}'], "steps of one site"),
}


@pytest.mark.parametrize("what", MEASURED)
def test_the_cards_command_measures_the_same_figure_by_the_same_method(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline("absorbing").save_pretrained("pipeline")
    Path("texts.txt").write_text("abc def gab fed cab bag face " * 10)
    words, time = MEASURED[what]
    assert (
        vdm_hub_here("evaluate", "pipeline", "--dataset_name", "texts.txt", "--replicates", "2", *words, "--json") == 0
    )
    Path("evaluation.json").write_text(capsys.readouterr().out)
    first = json.loads(Path("evaluation.json").read_text())
    assert vdm_hub_here("publish", "pipeline", "me/texts", "--dry_run", "--evaluation", "evaluation.json") == 0
    card = Path("publication/main/README.md").read_text()
    (command,) = re.findall(r"```bash\nvdm-hub (evaluate.*?)\n```", card.replace("\\\n", ""), flags=re.DOTALL)
    assert time in card and (time == "continuous time" or "continuous time" not in card)
    capsys.readouterr()
    assert vdm_hub_here(*(one.replace("me/texts", "pipeline") for one in shlex.split(command)), "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert {name: again.get(name) for name in ("method", "options", "bits_per_dim", "transitions")} == {
        name: first.get(name) for name in ("method", "options", "bits_per_dim", "transitions")
    }


# Networks of which all but the first read, one way or another, what their attention mask hides.
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
NETWORKS = {
    "Bert": {},
    "FNet": {},
    "Nystromformer": {},
    "ConvBert": {"embedding_size": 8},
    "MobileBert": {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_probabilities_of_all_texts_of_a_length_sum_to_one(name: str) -> None:
    """A network that could read the text in what fills its window would give each text a probability near one."""
    alphabet = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate("abcd")}, merges=[]))
    alphabet.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=alphabet, mask_token="[MASK]")
    config = getattr(transformers, f"{name}Config")
    known = {one: value for one, value in SMALL.items() if hasattr(config(), one)} | NETWORKS[name]
    torch.manual_seed(1)
    positions = {"max_position_embeddings": 16, "pad_token_id": None}
    model = getattr(transformers, f"{name}ForMaskedLM")(config(vocab_size=5, **positions, **known)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)
    process = {"name": "absorbing", "package": "vdm-hub-tokens"}
    windows = {"length": LENGTH, "context": 0, "text_column": "text"}
    pipe = TokenPipeline(model, words, VDMScheduler(num_levels=4, forward_process=process), windows=windows)
    for size in (1, 2):
        texts = ["".join(one) for one in itertools.product("abcd", repeat=size)]
        report = pipe.log_likelihood(texts, "exact_order")
        assert (report.replicates, report.standard_error) == (1, 0)  # nothing is drawn
        assert float(report.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-5)  # float32


def test_a_run_shows_no_schedule_where_its_method_has_no_times(tmp_path: Path) -> None:
    process = {"name": "absorbing", "package": "vdm-hub-tokens"}
    given = run_fields(tmp_path, forward_process=process, evaluation_replicates=2, max_train_steps=1)
    report = train_here(tmp_path / "run", **given)
    assert report is not None and report.method == "masked_counts"
    assert not (tmp_path / "run" / "schedule.png").exists()
    written = vdm_hub_here("publish", tmp_path / "run", "me/texts", "--dry_run", "--output_dir", tmp_path / "out")
    assert written == 0 and "schedule" not in (tmp_path / "out" / "main" / "README.md").read_text()
