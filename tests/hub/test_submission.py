"""`vdm-hub evaluate MODEL --submit`: a figure of somebody else's model as a pull request, over the loopback Hub."""

from __future__ import annotations

import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import parse_eval_result_entries
from PIL import Image

from hub.clients import run_client
from hub.faults import FAULTS, Fault
from hub.messages import Response
from hub.publications import tiny_network
from hub.server import LoopbackHub
from hub.storage import Blob, Repository
from hub.test_publishing import vdm_hub
from runs import TORCHRUN
from vdm_hub.data.loading import load_split

MODEL, DATASET = "ada/ddpm", "ada/digits"
WORDS = {"--dataset_name": DATASET, "--replicates": "2", "--transitions": "5"}
ASK = """
info = model_info("ada/ddpm", revision=sys.argv[1], expand=["evalResults"])
answer([vars(entry) for entry in info.eval_results or []])
"""


def blobs(folder: Path) -> dict[str, Blob]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): Blob(path.read_bytes(), lfs=path.suffix == ".safetensors")
        for path in paths
    }


def save_model(folder: Path, seed: int = 0) -> dict[str, Blob]:
    """A checkpoint of diffusers alone, as others have them on the Hub."""
    DDPMPipeline(tiny_network(stock=True, seed=seed), DDPMScheduler(20)).save_pretrained(folder)
    return blobs(folder)


def parquet_of_digits(count: int) -> Blob:
    def png(image: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "PNG")
        return file.getvalue()

    rows = [
        {"bytes": png(image), "path": None} for image in load_split("digits", "test", num_levels=17).levels[:count]
    ]
    file = io.BytesIO()
    datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image()).to_parquet(file)
    return Blob(file.getvalue())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Blob]]:
    folder = tmp_path_factory.mktemp("model")
    one = parquet_of_digits(12)
    data = {"data/test-00000-of-00001.parquet": one, "data/train-00000-of-00001.parquet": one}
    return {"model": save_model(folder / "one"), "other": save_model(folder / "other", 1), "data": data}


@pytest.fixture
def hub(places: dict[str, dict[str, Blob]]) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.repositories[MODEL] = Repository(files=places["model"] | {"README.md": Blob(b"# Ada's\n")})
        hub.repositories[f"datasets/{DATASET}"] = Repository(files=places["data"])
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def evaluate(
    hub: LoopbackHub, home: Path, *words: str, model: str = MODEL, token: str | None = "hf_loopback", cwd: Path
) -> subprocess.CompletedProcess[str]:
    usual = [word for name, value in WORDS.items() if name not in words for word in (name, value)]
    return vdm_hub(hub.environment(home, token), "evaluate", model, *usual, *words, cwd=cwd)


def asked(hub: LoopbackHub) -> list[str]:
    """What was downloaded, which comes before any evaluation."""
    return [call.path for call in hub.calls if call.path.endswith((".safetensors", ".parquet"))]


def test_a_figure_becomes_a_pull_request(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    repository, dataset = hub.repositories[MODEL], hub.repositories[f"datasets/{DATASET}"]
    measured = repository.at("main").oid
    done = evaluate(hub, home, "--submit", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert f"{hub.url}/{MODEL}/discussions/1" in done.stderr
    assert repository.at("main").oid == measured, "main is its owner's"
    change = repository.at("refs/pr/1")
    new = change.files.keys() - repository.at("main").files.keys()
    (results,), (record,) = ([path for path in new if path.endswith(kind)] for kind in (".yaml", ".json"))
    assert len(new) == 2 and json.loads(change.files[record].content) == report
    (entry,) = run_client(hub.environment(home), ASK, "refs/pr/1")
    assert entry == vars(parse_eval_result_entries(yaml.safe_load(change.files[results].content))[0])
    assert (entry["dataset_id"], entry["task_id"]) == (DATASET, "bits_per_dim_test")
    assert entry["value"] == pytest.approx(report["bits_per_dim"], abs=1e-6)
    assert entry["dataset_revision"] == dataset.at("main").oid
    assert entry["source_url"] == f"{hub.url}/{MODEL}/blob/main/{record}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["date"]) and entry["verify_token"] is None
    error = f"{report['standard_error']:.2g} (Monte Carlo"
    clipped = f"with it {report['clipped']['bits_per_dim']:.4f} bits/dim"
    for said in (measured, error, clipped, "12 images", "protocol: bound, transitions=5."):
        assert said in entry["notes"]
    assert change.message == entry["notes"] and list(tmp_path.iterdir()) == [] and hub.leaked_tokens() == []

    # Merged or not, the repository has the figure now, and it is not measured again.
    for place in ("discussions/1", "tree/main"):
        again = evaluate(hub, home, "--submit", cwd=tmp_path)
        assert (again.returncode, again.stdout) == (2, "")
        error = again.stderr.splitlines()[-1]
        assert error.startswith("error:") and str(entry["value"]) in error and place in error
        assert repository.pull_requests.keys() == {1}
        repository.commit("main", "merged", dict(change.files))
        repository.pull_request_titles.clear()

    # By another protocol it has none; and without a token it is shown what would be sent.
    shown = evaluate(hub, home, "--submit", "--dry_run", "--transitions", "6", token=None, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "transitions=6." in shown.stdout and "would be submitted" in shown.stdout
    assert repository.pull_requests.keys() == {1}


def test_a_submission_that_fails_loses_no_figure(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    hub.fail(0, FAULTS["403"], times=None, route="commit")
    done = evaluate(hub, home, "--submit", "--json", cwd=tmp_path)
    assert done.returncode == 2
    report = json.loads(done.stdout)
    (folder,) = tmp_path.iterdir()
    assert f"hf upload {MODEL} {folder.name} . --create-pr" in done.stderr
    (record,) = (folder / ".eval_results").glob("*.json")
    assert json.loads(record.read_text()) == report
    hub.heal()
    command = [str(Path(sys.executable).with_name("hf")), "upload", MODEL, folder.name, ".", "--create-pr"]
    sent = subprocess.run(
        command, env=hub.environment(home), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert sent.returncode == 0, sent.stderr
    (entry,) = run_client(hub.environment(home), ASK, "refs/pr/1")
    assert entry["value"] == pytest.approx(report["bits_per_dim"], abs=1e-6)


def test_an_answer_that_is_lost_is_no_reason_to_submit_twice(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    hub.fail(0, FAULTS["dropped after"], route="commit")
    done = evaluate(hub, home, "--submit", cwd=tmp_path)
    assert done.returncode == 2 and "bits/dim" in done.stdout
    assert f"{hub.url}/{MODEL}/discussions" in done.stderr and "may have been" in done.stderr
    assert hub.repositories[MODEL].pull_requests.keys() == {1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_an_interrupt_while_it_is_sent_loses_no_figure(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    words = [*itertools.chain(*WORDS.items()), "--submit", "--json"]
    command = [sys.executable, "-m", "vdm_hub.commands", "evaluate", MODEL, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that run in a shell's background ignore SIGINT, and what they start would do so, too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=hub.environment(home), cwd=tmp_path, preexec_fn=heed, **pipes) as process:

        def interrupt(handle: Callable[[], Response]) -> Response:
            process.send_signal(signal.SIGINT)
            time.sleep(8)
            return handle()

        hub.fail(0, interrupt, route="commit")
        printed, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    (folder,) = tmp_path.iterdir()
    assert folder.name in said and "may have been" in said and "Traceback" not in said
    assert json.loads(next(folder.rglob("*.json")).read_text()) == json.loads(printed)


def test_what_changes_while_it_is_measured_is_found(
    hub: LoopbackHub, home: Path, tmp_path: Path, places: dict[str, Any]
) -> None:
    """Another model, then another's figure of this one: nothing is submitted, and both figures are said."""
    repository = hub.repositories[MODEL]

    def meanwhile(files: dict[str, Blob]) -> Fault:
        def change(handle: Callable[[], Response]) -> Response:
            repository.commit("main", "meanwhile", dict(repository.at("main").files) | files)
            return handle()

        return change

    hub.fail(1, meanwhile(places["other"]), route="pull_requests")  # the first is asked before the evaluation
    done = evaluate(hub, home, "--submit", cwd=tmp_path)
    assert done.returncode == 2 and "bits/dim" in done.stdout
    assert "main" in done.stderr and repository.at("main").oid[:12] in done.stderr and not repository.pull_requests

    shown = evaluate(hub, home, "--submit", "--dry_run", cwd=tmp_path)
    path, text = re.search(r"(\S+\.yaml)\n(- dataset:.*)", shown.stdout, re.DOTALL).groups()  # type: ignore[union-attr]
    hub.fail(1, meanwhile({path: Blob(re.sub("value: .*", "value: 7.25", text).encode())}), route="pull_requests")
    done = evaluate(hub, home, "--submit", cwd=tmp_path)
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert done.returncode == 2 and not repository.pull_requests
    assert "7.25" in done.stderr and str(entry.value) in done.stderr.splitlines()[-1]


def test_of_two_processes_one_submits(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    words = [*itertools.chain(*WORDS.items()), "--submit", "--json"]
    command = [sys.executable, "-m", *TORCHRUN, "-m", "vdm_hub.commands", "evaluate", MODEL, *words]
    environment = hub.environment(home) | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2 and done.stderr.count("submitted: ") == 1
    assert hub.repositories[MODEL].pull_requests.keys() == {1}
    assert [call.route for call in hub.calls].count("commit") == 1


def test_a_target_that_is_not_reached_is_not_submitted(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    words = {"--target_standard_error": "1e-9", "--replicates": "8", "--max_replicates": "8", "--journal": "journal"}
    done = evaluate(hub, home, "--submit", "--json", *itertools.chain(*words.items()), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["target"]["reached"] is False and "not submitted" in done.stderr
    assert not hub.repositories[MODEL].pull_requests


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a part": (("--submit", "--max_images", "5"), "--max_images"),
    "a slice": (("--submit", "--split", "test[:5]"), r"test\[:5\]"),
    "one replicate": (("--submit", "--replicates", "1"), "--replicates"),
    "digits of scikit-learn": (("--submit", "--dataset_name", "digits"), "'digits'"),
    "a folder": (("--submit", "--dataset_name", "./pictures"), "pictures"),
    "no such dataset": (("--submit", "--dataset_name", "ada/none"), "ada/none"),
    "no such revision": (("--submit", "--revision", "v9"), "revision"),
    "another model's revision": (("--submit", "--revision", "v2"), "--revision"),
    "no submission": (("--dry_run",), "--submit"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_could_not_be_stated_is_refused_before_the_evaluation(
    words: tuple[str, ...], said: str, hub: LoopbackHub, home: Path, tmp_path: Path, places: dict[str, Any]
) -> None:
    hub.repositories[MODEL].commit("v2", "another", places["other"])
    done = evaluate(hub, home, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error:") and re.search(said, error) and "Traceback" not in done.stderr
    assert not hub.repositories[MODEL].pull_requests and list(tmp_path.iterdir()) == []


TOKENS: dict[str, tuple[str | None, str]] = {
    "none": (None, "hf auth login"),
    "one that may only read": ("hf_reader", "only read"),
    "one that is none": ("hf_unknown", "token"),
}


@pytest.mark.parametrize(("token", "said"), TOKENS.values(), ids=TOKENS.keys())
def test_a_token_that_may_not_send_is_found_before_the_evaluation(
    token: str | None, said: str, hub: LoopbackHub, home: Path, tmp_path: Path
) -> None:
    hub.tokens["hf_reader"] = "read"
    done = evaluate(hub, home, "--submit", token=token, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr
    assert asked(hub) == []


def test_a_folder_is_no_repository(hub: LoopbackHub, home: Path, tmp_path: Path) -> None:
    for model in (str(tmp_path), "ada/missing", "ddpm"):
        done = evaluate(hub, home, "--submit", model=model, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "") and Path(model).name in done.stderr
    assert asked(hub) == []
