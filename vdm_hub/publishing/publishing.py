"""Publish a pipeline: its stock twin and carried code first, then all the rest in one commit on main."""

from __future__ import annotations

import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from vdm_hub.data.kinds import kind_of
from vdm_hub.errors import CheckpointError, ConfigurationError, PublishError, warn
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.hub.install_hint import add_install_hint
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.outgoing import make_public, refuse_secrets
from vdm_hub.hub.places import INDEX
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.by_name import PIPELINES
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.publishing.card import Edition, render_card
from vdm_hub.publishing.contents import (
    Contents,
    components_of,
    copy_pipeline,
    copy_records,
    is_managed,
    read_contents,
)
from vdm_hub.publishing.eval_results import OWN_RESULTS, published_results
from vdm_hub.publishing.remote_code import add_remote_code, check_remote_code
from vdm_hub.publishing.repository import MAIN, HubRepository, check_ready
from vdm_hub.publishing.stock_twin import build_stock_twin, twin_error
from vdm_hub.publishing.wording import wording_of
from vdm_hub.version import __version__

__all__ = ["Publication", "check_ready", "publish"]

TWIN_BRANCH, CODE_BRANCH = "diffusers", "remote-code"
_NO_TWIN_IN_REQUEST = "this model came as a pull request, which brings one branch alone."
_BRANCH = re.compile(
    r"(?!.*(?:\.\.|//|/\.|@\{|\.lock(?:/|$)))[^\s\x00-\x1f\x7f~^:?*\[\\./-][^\s\x00-\x1f\x7f~^:?*\[\\]*(?<![/.])"
)
_TWIN_IMAGES, _TWIN_STEPS = 16, 50


@dataclass(frozen=True)
class Publication:
    """The result of a publication.

    Attributes:
        repo_id: The repository.
        url: Its address, or that of the pull request.
        commit: The commit on main (or the revision asked for); ``None`` for a pull request.
        twin: The commit of the stock twin, where there is one.
        remote_code: The commit that carries the code, where it was asked for.
        no_results: Why the figure is not among the Hub's evaluation results; empty where it is.
    """

    repo_id: str
    url: str
    commit: str | None
    twin: str | None = None
    remote_code: str | None = None
    no_results: str = ""


@dataclass(frozen=True)
class Prepared:
    """A publication on disk, but for the card, which names commits that are still to be made.

    Attributes:
        source: Where it comes from.
        pipeline: The pipeline, loaded.
        edition: What the card says of the publication, as far as it is known.
        folders: What goes to each branch; what goes to ``main`` goes to the edition's revision.
    """

    source: Contents
    pipeline: LikelihoodPipeline
    edition: Edition
    folders: dict[str, Path]

    def write_card(self, edition: Edition) -> Path:
        """Write the card into the folder for main, and return that folder."""
        folder = self.folders[MAIN]
        (folder / "README.md").write_text(render_card(self.source, self.pipeline, edition), "utf-8")
        if results := self.results(edition)[0]:
            (folder / OWN_RESULTS).parent.mkdir(exist_ok=True)
            (folder / OWN_RESULTS).write_text(results, "utf-8")
        refuse_secrets(folder)
        return folder

    def results(self, edition: Edition) -> tuple[str, str]:
        """The file for the Hub's evaluation results, or why there is none: see `published_results`."""
        branch = urllib.parse.quote(edition.revision, safe="")
        record = f"{constants.ENDPOINT}/{edition.repo_id}/blob/{branch}/evaluation.json"
        return published_results(self.source.evaluation, record)


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str = MAIN,
    create_pr: bool = False,
    remote_code: bool = False,
    license: str | None = None,
    evaluation: Path | None = None,
) -> Publication:
    """Publish a run, or a pipeline alone.

    The stock twin goes to the branch ``diffusers`` and the carried code to ``remote-code`` (beside another revision
    than main: ``v2-diffusers``, ``v2-remote-code``), before one commit on ``revision`` that brings everything else and
    names their commits. So whatever fails, that branch is as it was, or complete; and the next publication goes on
    from there. A side branch that this model has no use for is emptied afterwards.

    Args:
        folder: A run's folder, or the pipeline's in it, or a pipeline alone.
        repo_id: ``owner/name``.
        private: Whether a new repository is private.
        revision: The branch for everything; made from main where it does not exist.
        create_pr: Open a pull request instead; then there is no twin and no carried code.
        remote_code: Also publish the code, for readers without vdm_hub.
        license: Of the weights, as the Hub names licences, such as ``apache-2.0``.
        evaluation: What ``vdm-hub evaluate --json`` printed, instead of the run's own measurement.

    Raises:
        CheckpointError: There is no pipeline, or it is damaged.
        PublishError: The Hub, or the token, did not let it happen.
    """
    if create_pr and (remote_code or private):
        option = "--remote_code" if remote_code else "--private"
        raise ConfigurationError(f"a pull request goes to one branch of a repository as it is: leave out {option}.")
    check_revision(revision)
    repository = HubRepository(repo_id)
    edition = Edition(repo_id, revision, license)
    with prepared_publication(folder, edition, evaluation, twin=not create_pr, remote_code=remote_code) as prepared:
        if create_pr:
            return _request(prepared, repository)
        with repository.interruptible():
            return send(prepared, repository, private)


@contextmanager
def prepared_publication(
    folder: Path, edition: Edition, evaluation: Path | None, twin: bool, remote_code: bool
) -> Iterator[Prepared]:
    """A publication on disk, whole and checked, before anything is sent."""
    source = read_contents(folder, evaluation)
    pipeline = _load(source.pipeline)
    if remote_code and type(pipeline) is not VDMPipeline:
        raise ConfigurationError(
            f"{source.pipeline} holds a {type(pipeline).__name__}, and code is carried for a VDMPipeline alone: leave "
            f"--remote_code out."
        )
    pipeline.set_progress_bar_config(disable=True)
    _check_evaluation(source, pipeline)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {MAIN: Path(temporary) / MAIN}
        copy_pipeline(source.pipeline, folders[MAIN])
        copy_records(source, folders[MAIN])
        if twin:
            folders[TWIN_BRANCH] = Path(temporary) / TWIN_BRANCH
            edition = _add_twin(pipeline, folders, edition)
        if remote_code:
            folders[CODE_BRANCH] = Path(temporary) / CODE_BRANCH
            copy_pipeline(source.pipeline, folders[CODE_BRANCH])
            add_remote_code(folders[CODE_BRANCH])
            check_remote_code(folders[CODE_BRANCH])
        add_install_hint(folders[MAIN])
        for staged in folders.values():
            make_public(staged)
        yield Prepared(source, pipeline, edition, folders)


def _load(folder: Path) -> LikelihoodPipeline:
    name = read_json(folder / INDEX).get("_class_name")
    if name not in PIPELINES:
        raise CheckpointError(f"{folder} holds a {name}, not a pipeline of vdm_hub: {', '.join(PIPELINES)}.")
    pipeline: LikelihoodPipeline = PIPELINES[name].from_pretrained(folder)
    if pipeline.config.get("captions") is not None and pipeline.components.get("text_encoder") is None:
        raise CheckpointError(
            f"{folder} is of a model that is told captions, and has no text_encoder, without which its readers can "
            f"give no prompt: save the pipeline with its text_encoder and tokenizer."
        )
    return pipeline


def _check_evaluation(source: Contents, pipeline: LikelihoodPipeline) -> None:
    """Refuse to put a figure on the card that other weights reached."""
    measured = source.evaluation.get("weights")
    if source.evaluation and measured != weights_fingerprint(pipeline):
        raise CheckpointError(
            f"the evaluation beside {source.pipeline} was measured with other weights (fingerprint "
            f"{str(measured)[:20]}...): measure these by `vdm-hub evaluate {source.pipeline} --dataset_name ... "
            f"--json > FILE`, and give --evaluation FILE."
        )
    told, own = source.evaluation.get("condition"), None if pipeline.condition is None else pipeline.condition.noun
    if source.evaluation and told != own:
        raise CheckpointError(
            f"the evaluation beside {source.pipeline} is of {pipeline.kind.data} given {told or 'nothing'}, and the "
            f"model is told {own or 'nothing'}: it was changed. Measure again, or remove the file."
        )
    datasets = {"evaluation.json": source.evaluation.get("dataset"), "run.json": source.run.get("dataset")}
    for name, dataset in datasets.items():
        if dataset and not pipeline.may_be_of(dataset):
            raise CheckpointError(
                f"{name} beside {source.pipeline} is of {kind_of(dataset).data} of shape {dataset['shape']} and "
                f"{dataset['levels']} levels, and the model's are {pipeline.kind.data} of {list(pipeline.shape)} and "
                f"{pipeline.num_levels}: it was changed. Measure again, or remove the file."
            )


def _add_twin(pipeline: LikelihoodPipeline, folders: dict[str, Path], edition: Edition) -> Edition:
    """Save the twin where there can be one; the edition then knows its error, or why there is none."""
    if type(pipeline) is not VDMPipeline:
        del folders[TWIN_BRANCH]
        return replace(edition, no_twin=wording_of(pipeline).no_twin)
    try:
        twin = build_stock_twin(pipeline)
    except ConfigurationError as reason:
        del folders[TWIN_BRANCH]
        return replace(edition, no_twin=str(reason))
    twin.save_pretrained(folders[TWIN_BRANCH], safe_serialization=True)
    steps = min(_TWIN_STEPS, len(twin.scheduler))  # a stock scheduler has no more than its timesteps
    error = twin_error(pipeline, twin, _TWIN_IMAGES, steps, seed=0)
    return replace(edition, twin_error=str(error))


def send(prepared: Prepared, repository: HubRepository, private: bool | None = None) -> Publication:
    """Send what is prepared: the side branches, then one commit that names theirs."""
    repository.create(private)
    branch = prepared.edition.revision
    repository.ensure_branch(branch)
    parent = repository.head(branch)
    twin, code = side_branch(TWIN_BRANCH, branch), side_branch(CODE_BRANCH, branch)
    former = {twin, code} & repository.branches()
    commits = {
        side: _mirror(repository, prepared.folders[kind], side)
        for kind, side in ((TWIN_BRANCH, twin), (CODE_BRANCH, code))
        if kind in prepared.folders
    }
    edition = replace(
        prepared.edition,
        repo_id=repository.repo_id,
        twin=commits.get(twin),
        remote_code=commits.get(code),
        remote_code_branch=code,
    )
    staged = prepared.write_card(edition)
    commit = repository.commit(staged, _title(), branch, parent, _stale(repository, staged, parent))
    for side in sorted(former - set(commits)):
        _empty(repository, staged, side, commit)
    why = prepared.results(edition)[1]
    return Publication(repository.repo_id, repository.url, commit, edition.twin, edition.remote_code, why)


def _empty(repository: HubRepository, staged: Path, side: str, commit: str) -> None:
    """Take a former model from a side branch, once the new one is on the branch that names none."""
    try:
        _mirror(repository, _farewell(staged, side, commit), side)
    except PublishError as error:
        raise PublishError(
            f"the model was published, as {commit}, but the branch {side} may still hold the former one's: "
            f"{str(error)[:500].rstrip('.')}. Publish again: that finishes it."
        ) from error


def _request(prepared: Prepared, repository: HubRepository) -> Publication:
    """Open a pull request with what `send` would commit."""
    branch = prepared.edition.revision
    parent = repository.head(branch)
    staged = prepared.write_card(replace(prepared.edition, no_twin=_NO_TWIN_IN_REQUEST))
    url = repository.open_pull_request(staged, _title(), branch, parent, _stale(repository, staged, parent))
    return Publication(repository.repo_id, url, None, no_results=prepared.results(prepared.edition)[1])


def _stale(repository: HubRepository, staged: Path, parent: str) -> list[str]:
    """The files that an earlier publication left at a commit, and this one does not have."""
    there = set(repository.files(parent))
    here = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    folder = f"{constants.EVAL_RESULTS_FOLDER}/"
    if others := sorted(path for path in there - {OWN_RESULTS} if path.startswith(folder) and path.endswith(".yaml")):
        warn(
            f"{repository.repo_id} also states the figures of {', '.join(others[:4])}, which were submitted and stay: "
            f"remove those that are not of these weights."
        )
    return [path for path in sorted(there - here) if is_managed(path, components_of(there))]


def side_branch(side: str, branch: str) -> str:
    """The branch beside main, or beside another branch, that holds the twin or the carried code."""
    return side if branch == MAIN else f"{branch}-{side}"


def _farewell(staged: Path, side: str, commit: str) -> Path:
    """Make a folder that tells readers of a side branch why it holds no model any more."""
    folder = staged.with_name(f"{side.replace('/', '-')}-gone")
    folder.mkdir()
    (folder / "README.md").write_text(
        f"This branch belonged to an earlier model. The present one, {commit}, was published without it: see its "
        f"card.\n"
    )
    return folder


def _mirror(repository: HubRepository, folder: Path, branch: str) -> str:
    """Make a side branch hold exactly a folder."""
    repository.ensure_branch(branch)
    parent = repository.head(branch)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stale = sorted(set(repository.files(parent)) - here - {".gitattributes"})
    return repository.commit(folder, _title(), branch, parent, stale)


def _title() -> str:
    return f"Publish with vdm_hub {__version__}"


def check_revision(revision: str) -> None:
    """Refuse what can't be the branch of a model.

    Raises:
        ConfigurationError: It is no branch's name, as git has them, or the name of a side branch.
    """
    if not _BRANCH.fullmatch(revision) or not revision.isprintable():
        raise ConfigurationError(f"revision is {revision!r}, which git can't have as a branch: name one such as v2.")
    if revision in (TWIN_BRANCH, CODE_BRANCH):
        raise ConfigurationError(
            f"revision is {revision!r}: name a branch of its own; {TWIN_BRANCH!r} and {CODE_BRANCH!r} hold the stock "
            f"twin and the carried code."
        )
