"""A model of texts is published with a card in bits/byte, and read by its Hub id, with its plugin and without."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import runs
from hub.readers import Reader, reader
from hub.server import LoopbackHub, Repository
from hub.test_idioms import weights_asked_for
from naming import naming
from tiny import seeded
from tiny_tokens import LENGTH, PROCESS, pipeline
from vdm_hub import TokenPipeline
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.publishing.card import Edition, render_card
from vdm_hub.publishing.contents import Contents, read_contents
from vdm_hub.publishing.dry_run import write_publication

TEXT = "a bad cab faced a bag; fed, a gab ebbed. " * 12
NETWORK = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
READ = """
import json, torch, vdm_hub
from diffusers import DiffusionPipeline
for loader in (vdm_hub.TokenPipeline, DiffusionPipeline):
    pipe = loader.from_pretrained("me/texts")
    pipe.set_progress_bar_config(disable=True)
    ids = pipe(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).ids
    print(json.dumps([ids.tolist(), pipe.log_likelihood("a bad cab", replicates=2).bits_per_byte]))
"""
WITHOUT = """
import vdm_hub
from diffusers import DiffusionPipeline
for loader in (vdm_hub.TokenPipeline, DiffusionPipeline):
    try:
        loader.from_pretrained("me/texts")
    except vdm_hub.errors.MissingPluginError as error:
        print(error)
"""
PUSH = """
import sys
from vdm_hub import TokenPipeline
TokenPipeline.from_pretrained(sys.argv[1]).push_to_hub("me/texts")
"""


pytestmark = pytest.mark.usefixtures("token_plugin")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, token_plugin: Path) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT)
    usual = {"num_levels": 256, "noise_schedule": "linear", "unet": {}, "model": "tokens", "network": NETWORK}
    texts = {"dataset_name": str(folder / "a.txt"), "tokenizer": "character", "window_length": LENGTH}
    drawn = {"num_sample_images": 3, "evaluation_replicates": 2}
    runs.train_here(folder / "run", **usual, **texts, **drawn, forward_process=PROCESS)
    return folder / "run"


def card(run: Path, **others: Any) -> ModelCard:
    source = read_contents(run)
    source = Contents(**{**vars(source), **others})
    return ModelCard(render_card(source, TokenPipeline.from_pretrained(source.pipeline), Edition("me/texts")))


# ---- over HTTP ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A run that was published as it ended, and what readers got of it."""

    card: ModelCard
    repository: Repository
    run: Path
    user: Reader
    read: list[Any]
    said: str
    asked: list[str]
    pushed: bytes


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, run: Path, token_plugin: Path) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("published")
    recipe = Path(run / "recipe.yaml").read_text().replace(str(run), str(folder / "author" / "run"))
    (folder / "recipe.yaml").write_text(recipe)
    with LoopbackHub() as hub:
        author, with_it, without = (
            reader(folder / name, hub, token)
            for name, token in (("author", "hf_loopback"), ("with", None), ("without", None))
        )
        for one in (author, with_it):
            one.environment["PYTHONPATH"] += f"{os.pathsep}{token_plugin}"  # type: ignore[index]
        launch = [str(author.python), "-m", *runs.LAUNCH, "-m", "vdm_hub.train", str(folder / "recipe.yaml")]
        trained = author.run(*launch, "--push_to_hub", "true", "--hub_model_id", "me/texts")
        assert trained.returncode == 0, trained.stderr[-4000:]
        repository = hub.repositories["me/texts"]
        first = repository.at("main").files["README.md"].content
        read = with_it.run(str(with_it.python), "-c", READ)
        assert read.returncode == 0, read.stderr[-4000:]
        before = len(hub.calls)
        said = without.run(str(without.python), "-c", WITHOUT)
        asked = weights_asked_for(hub.calls[before:])
        pushed = author.run(str(author.python), "-c", PUSH, str(author.home / "run" / "pipeline"))
        assert pushed.returncode == 0, pushed.stderr[-4000:]
        lines = [json.loads(line) for line in read.stdout.splitlines()[-2:]]
        yield Published(
            ModelCard(first.decode()),
            repository,
            author.home / "run",
            with_it,
            lines,
            said.stdout,
            asked,
            repository.at("main").files["README.md"].content,
        )


def test_a_run_publishes_texts_and_no_side_branch(published: Published) -> None:
    files = set(published.repository.at("main").files)
    own = {"network/config.json", "network/model.safetensors", "tokenizer/tokenizer.json", "samples.txt", "run.json"}
    assert own <= files and "images/samples.png" not in files
    assert set(published.repository.branches) == {"main"}
    assert str(published.run.parent).encode() not in b"".join(
        blob.content for blob in published.repository.at("main").files.values()
    )


def test_what_is_loaded_by_its_id_is_what_was_trained(published: Published) -> None:
    pipe = TokenPipeline.from_pretrained(published.run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    ids = pipe(2, num_inference_steps=3, generator=seeded()).ids
    bits = pipe.log_likelihood("a bad cab", replicates=2).bits_per_byte
    assert published.read == [[ids.tolist(), bits]] * 2


def test_a_reader_without_the_plugin_learns_its_name_before_any_weight_is_asked_for(published: Published) -> None:
    said = published.said.splitlines()
    assert len(said) == 2 and all(PROCESS["package"] in line and "pip install" in line for line in said)
    assert published.asked == []


def test_its_id_stands_for_its_tokenizer(published: Published) -> None:
    words = TokenPipeline.from_pretrained(published.run / "pipeline").tokenization
    read = "from vdm_hub.data.tokenization import open_tokenizer as read; print(read('me/texts').num_values)"
    done = published.user.run(str(published.user.python), "-c", read)
    assert done.stdout.split() == [str(words.num_values)], done.stderr[-4000:]


def test_a_published_card_survives_push_to_hub(published: Published) -> None:
    assert published.pushed.decode() == str(published.card)
    assert next(published.repository.history("main")).title == "Upload TokenPipeline"


def test_every_snippet_of_the_card_runs_and_its_figure_is_measured_again(published: Published) -> None:
    blocks = re.findall(r"```python\n(.*?)```", str(published.card), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        done = published.user.python_block(block + "\nassert type(pipe).__name__ == 'TokenPipeline'")
        assert done.returncode == 0, done.stderr[-4000:]
    (command,) = re.findall(r"```bash\n(vdm-hub evaluate.*?)\n```", str(published.card), flags=re.DOTALL)
    (published.user.home / "a.txt").write_text(TEXT)
    (total,) = re.findall(r"\*\*total\*\* \| \*\*([\d.]+)\*\*", str(published.card))
    assert f"{total} bits/byte" in published.user.shell_block(command)


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_has_each_unit_with_both_errors_and_how_texts_are_cut(run: Path) -> None:
    made, measured = card(run), json.loads((run / "evaluation.json").read_text())
    assert made.data.pipeline_tag == "text-generation" and {"bits-per-byte", PROCESS["package"]} <= set(made.data.tags)
    results = {result.metric_type: result for result in made.data.eval_results}
    for name in ("bits_per_byte", "bits_per_token", "perplexity"):
        assert results[name].metric_value == pytest.approx(measured[name], abs=1e-6)
        assert {"standard_error", "standard_error_over_windows", "num_windows"} <= set(results[name].metric_args)
    assert made.data.eval_results[0].metric_type == "bits_per_byte"
    assert results["bits_per_byte"].metric_args["standard_error"] == measured["standard_error_per_byte"]
    columns = [f"{measured[name]:.4f}" for name in ("bits_per_byte", "bits_per_token", "perplexity")]
    assert f"| **total** | **{columns[0]}** | **{columns[1]}** | **{columns[2]}** |" in made.text
    assert f"at most {columns[0]} bits/byte" in made.text and f"windows of {LENGTH} tokens" in made.text
    assert "the characters of the training texts" in made.text and "`[MASK]`" in made.text
    assert (run / "samples.txt").read_text().splitlines()[1] in made.text


def test_why_there_is_neither_twin_nor_carried_code_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=naming("TokenPipeline", "--remote_code")):
        write_publication(run, "me/texts", tmp_path / "out", remote_code=True)
    written = write_publication(run, "me/texts", tmp_path / "out")
    assert {path.parts[0] for path in written} == {"main"}
    text = (tmp_path / "out" / "main" / "README.md").read_text()
    assert "no twin for plain diffusers" in text and "No code is carried" in text


HOSTILE = [
    "```\n# Free\n```",
    "````\n<script>",
    "\n\n\n\n# x\n",
    "\x1b[31m\u202e\u2028\r\x85",
    "~~~\n---\n",
    "a\tb",
    "`" * 40,
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_sample_leaves_its_block(run: Path, hostile: str) -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(card(run, samples=hostile).text)
    usual = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(card(run, samples="word").text)
    assert [token.type for token in tokens] == [token.type for token in usual]
    (shown,) = (token.content for token in tokens if token.info == "text")
    assert shown.isprintable() or set(filter(lambda one: not one.isprintable(), shown)) == {"\n"}
    if hostile.isprintable() or "\x1b" not in hostile:
        assert shown.removesuffix("\n") == hostile.expandtabs(4)


def test_a_long_file_of_samples_is_cut_and_said(run: Path) -> None:
    text = card(run, samples="word\n" * 5000).text
    assert text.count("word\n") < 2000 and "\n[...]\n```" in text


def test_a_model_without_a_run_says_what_is_not_known(tmp_path: Path) -> None:
    pipeline(context=3).save_pretrained(tmp_path)
    text = card(tmp_path).text
    assert "has not been measured" in text and "bits/token" in text and "Nothing is recorded of the data" in text
    assert "begin with the last 3 of the one before" in text


def test_unknown_characters_leave_no_figure_by_byte_and_say_why(run: Path) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    note = "the tokenizer does not know 3 of 49 characters (6.12%), so that there is no figure in bits/byte"
    of_bytes = dict.fromkeys([name for name in record if name.endswith("_per_byte")] + ["bytes"])
    made = card(run, evaluation=record | of_bytes | {"notes": [note]})
    assert made.data.eval_results[0].metric_type == "bits_per_token"
    assert "does not know 3 of 49" in made.text and "There is no figure in bits/byte" in made.text


CHANGED: dict[str, dict[str, Any]] = {
    "another perplexity": {"perplexity": 2.0},
    "another figure by token": {"bits_per_token": 1.0},
    "another figure by byte": {"bits_per_byte": 0.5},
    "another error by byte": {"standard_error_per_byte": 0.5},
    "no bytes": {"bytes": None},
    "a half of it": {"tokens": 3},
}


@pytest.mark.parametrize("what", CHANGED)
def test_figures_of_texts_that_do_not_agree_are_refused(run: Path, tmp_path: Path, what: str) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(record))
    assert read_contents(run, path).evaluation == record
    path.write_text(json.dumps(record | CHANGED[what]))
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        read_contents(run, path)


def test_a_measurement_of_images_is_none_of_texts(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    for change in ({"levels": 5}, {"shape": [9999]}):
        path = tmp_path / "evaluation.json"
        path.write_text(json.dumps(record | {"dataset": record["dataset"] | change}))
        with pytest.raises(CheckpointError, match="levels"):
            write_publication(run, "me/texts", tmp_path / "out", evaluation=path)
