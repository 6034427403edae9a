"""A figure as a pull request to the repository of the model, whoever it belongs to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, parse_eval_result_entries

from vdm_hub.data.sources import is_local
from vdm_hub.errors import (
    ConfigurationError,
    HubError,
    Interrupted,
    PublishError,
    VDMHubError,
    in_one_line,
    shortened,
)
from vdm_hub.hub.fetching import hub_explained
from vdm_hub.hub.outgoing import make_public
from vdm_hub.hub.places import INDEX
from vdm_hub.publishing.contents import components_of
from vdm_hub.publishing.eval_results import Stated, entry_of, not_stated, results_yaml
from vdm_hub.publishing.repository import MAIN, HubRepository


@dataclass(frozen=True)
class Target:
    """Where a figure will be submitted to, and what it will be a figure of.

    Attributes:
        repository: The model's.
        commit: Of the model, which is to be measured.
        dataset: Its id on the Hub.
        dataset_commit: Which it was at when this was asked.
    """

    repository: HubRepository
    commit: str
    dataset: str
    dataset_commit: str


def open_target(model: str, revision: str | None, dataset: str, *, sends: bool = True) -> Target:
    """Ask the Hub, before anything is measured, whether a figure could be submitted.

    Args:
        model: The model's Hub id.
        revision: What of it is to be measured; main where not given.
        dataset: The dataset's Hub id.
        sends: Whether something will be sent, for which there must be a token that may.

    Raises:
        ConfigurationError: The model or the dataset is none of the Hub.
        PublishError: There is no token, it may only read, or the weights are not main's, which a figure is shown for.
        HubError: The Hub has no such dataset.
    """
    if is_local(model) or "/" not in model:
        raise ConfigurationError(
            f"the model {shortened(model)} is no Hub id owner/name, or is a folder here, and a figure is submitted to "
            f"a repository on the Hub: give its id, or publish the model with its figure by `vdm-hub publish`."
        )
    if is_local(dataset) or (why := not_stated({"name": dataset, "split": "test"})):
        why = f"{shortened(dataset)} is a path here" if is_local(dataset) else why
        raise ConfigurationError(f"no figure can be submitted: {why}. Name one, or measure without submitting.")
    repository = HubRepository(model, sends=sends)
    if sends:
        repository.check_may_send()
    commit = repository.head(revision or MAIN)
    _check_is_main(repository, commit)
    return Target(repository, commit, dataset, dataset_commit(dataset))


def check_place(target: Target, place: Stated, measured: str = "not measured") -> None:
    """Refuse to state a figure that the repository states already, or an open pull request would.

    Args:
        target: Where to.
        place: The figure's.
        measured: It, for the message.

    Raises:
        PublishError: It is there, with which value and where.
    """
    repository = target.repository
    where = {MAIN: f"{repository.url}/tree/{MAIN}/.eval_results"}
    for number in repository.requests(_title(place)):
        where[f"refs/pr/{number}"] = f"{repository.url}/discussions/{number}"
    for revision, url in where.items():
        for entry in filter(place.is_of, repository.results(revision)):
            raise PublishError(
                f"{repository.repo_id} has a figure of {place.dataset_id}, {place.task_id}, by this protocol "
                f"({place.protocol}) {'in an open pull request' if revision != MAIN else 'already'}: "
                f"{shortened(entry.value)}, at {url} (here: {measured}). Nothing was submitted. If it is wrong, "
                f"say so there; or measure without submitting."
            )


def submitted_files(target: Target, place: Stated, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The files of a figure's pull request by their paths: the Hub's own, and the whole record beside it."""
    record = str(Path(place.file).with_suffix(".json"))
    entry = entry_of(
        evaluation,
        place,
        f"{target.repository.url}/blob/{MAIN}/{record}",
        date=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        dataset_revision=target.dataset_commit if _dataset_stayed(target) else None,
        measured=f"measured at commit {target.commit}",
    )
    return {place.file: results_yaml(entry), record: json.dumps(dict(evaluation), indent=1) + "\n"}


def submit(target: Target, place: Stated, files: Mapping[str, str]) -> str:
    """Open the pull request; returns its address.

    Args:
        target: Where to.
        place: The figure's.
        files: As `submitted_files` makes them.

    Raises:
        PublishError: The repository has a figure or other weights meanwhile, or the Hub did not take it; what was
            measured is then kept in a folder here, which the message names with the command that submits it.
    """
    entry = parse_eval_result_entries(yaml.safe_load(files[place.file]))[0]
    repository = target.repository
    try:
        check_place(target, place, str(entry.value))
        head = repository.head(MAIN)
        _check_is_main(repository, target.commit)
        with tempfile.TemporaryDirectory() as temporary:
            _write(files, Path(temporary))
            make_public(Path(temporary))
            return repository.open_pull_request(Path(temporary), _title(place), MAIN, head, description=entry.notes)
    except (VDMHubError, OSError) as error:
        raise PublishError(f"{in_one_line(error)[:600]} {_kept(repository, files)}") from error
    except KeyboardInterrupt as stop:
        said = str(stop) if isinstance(stop, Interrupted) else "nothing was submitted."
        raise Interrupted(f"{said} {_kept(repository, files)}") from stop


def _kept(repository: HubRepository, files: Mapping[str, str]) -> str:
    """Keep the files in a new folder here; returns the words on it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="submission-", dir=Path.cwd()))
        _write(files, folder)
    except OSError as error:
        return f"The figure is printed above, and could not be written here ({in_one_line(error)})."
    command = f"hf upload {repository.repo_id} {folder.name} . --create-pr"
    return f"The figure is kept in {folder.name}, and `{command}` submits it."


def _write(files: Mapping[str, str], folder: Path) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, "utf-8")


def _dataset_stayed(target: Target) -> bool:
    """Whether the dataset is still at the commit that it was at before it was read; not, where nobody answers."""
    try:
        return dataset_commit(target.dataset) == target.dataset_commit
    except HubError:
        return False


def dataset_commit(dataset: str) -> str:
    """The commit that a dataset on the Hub is at.

    Raises:
        HubError: There is none, or the Hub can't be reached.
    """
    with hub_explained(f"the dataset {dataset} can't be read from the Hub"):
        return str(HfApi().dataset_info(dataset).sha)


def _check_is_main(repository: HubRepository, commit: str) -> None:
    """Refuse a commit whose model is not that of main: the Hub shows the figures of main."""
    head = repository.head(MAIN)
    if commit == head:
        return
    there, here = repository.files(head), repository.files(commit)
    components = components_of(set(there)) | components_of(set(here))

    def model(files: Mapping[str, str]) -> dict[str, str]:
        return {path: known for path, known in files.items() if path == INDEX or path.split("/")[0] in components}

    if model(there) != model(here):
        raise PublishError(
            f"the model of {repository.repo_id} at {commit[:12]} is not that of its branch {MAIN} ({head[:12]}), "
            f"whose figures are what the Hub shows: nothing was submitted. Measure {MAIN}, by leaving out --revision."
        )


def _title(place: Stated) -> str:
    return f"Evaluation result: {Path(place.file).stem}"
