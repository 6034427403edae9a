"""A publication in a folder instead of on the Hub; one folder after the other may take the same place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from vdm_hub.errors import OutputError
from vdm_hub.files import check_writable, destination, sha256, written_beside
from vdm_hub.hub.json_files import read_json
from vdm_hub.publishing.card import Edition
from vdm_hub.publishing.publishing import CODE_BRANCH, TWIN_BRANCH, check_revision, prepared_publication, side_branch
from vdm_hub.publishing.repository import MAIN, check_repo_id

LIST = "publication.json"
"""The file with the SHA-256 of each file of a dry run: nothing that is not listed in it may be replaced."""


def write_publication(
    folder: Path,
    repo_id: str,
    output: Path,
    *,
    revision: str = MAIN,
    remote_code: bool = False,
    license: str | None = None,
    evaluation: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write what `publish` would send into folders named after the branches; no network is used.

    Args:
        folder: A run's folder, or the pipeline's in it, or a pipeline alone.
        repo_id: ``owner/name``.
        output: Where to: a new or an empty folder.
        revision: As for `publish`.
        remote_code: As for `publish`.
        license: As for `publish`.
        evaluation: As for `publish`.
        overwrite: Whether ``output`` may be what a former call wrote, and nobody has changed since.

    Returns:
        The files, relative to ``output``. The card names branches where a publication names commits.

    Raises:
        OutputError: ``output`` holds something else.
        CheckpointError: There is no pipeline, or it is damaged.
        PublishError: It would publish a secret.
    """
    check_repo_id(repo_id)
    check_revision(revision)
    _check_place(output, overwrite)
    edition = Edition(repo_id, revision, license)
    with prepared_publication(folder, edition, evaluation, twin=True, remote_code=remote_code) as prepared:
        named = replace(
            prepared.edition,
            twin=side_branch(TWIN_BRANCH, revision) if TWIN_BRANCH in prepared.folders else None,
            remote_code=side_branch(CODE_BRANCH, revision) if remote_code else None,
            remote_code_branch=side_branch(CODE_BRANCH, revision),
        )
        prepared.write_card(named)
        with written_beside(output) as beside:
            for branch, staged in prepared.folders.items():
                shutil.copytree(staged, beside / (revision if branch == MAIN else side_branch(branch, revision)))
            hashes = _hashes(beside)
            (beside / LIST).write_text(json.dumps(hashes, indent=1) + "\n")
            _check_place(output, overwrite)  # somebody may have used the time
    return sorted(map(Path, hashes))


def _check_place(output: Path, overwrite: bool) -> None:
    """Refuse to replace what a dry run did not write, or what was changed since."""
    place = destination(output)
    check_writable(output)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not place.is_dir() or not (place / LIST).is_file():
        raise OutputError(f"{output} exists already and is no dry run's: name another folder, or remove it.")
    if not overwrite:
        raise OutputError(
            f"{output} exists already, with a former dry run: replace it with --overwrite, or name another folder."
        )
    listed, here = read_json(place / LIST), _hashes(place)
    paths = sorted((listed.keys() | here.keys()) - {LIST})
    changed = [path for path in paths if here.get(path) is None or listed.get(path) != here[path]]
    if changed:
        raise OutputError(
            f"{output} is not as a dry run left it: {changed[0]} was added, changed or removed. Nothing is replaced: "
            f"name another folder, or remove it."
        )


def _hashes(folder: Path) -> dict[str, str | None]:
    """The SHA-256 of each file in a folder, by its path; links, empty folders and all else have none."""
    found: dict[str, str | None] = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        if plain or not path.is_dir() or path.is_symlink() or not any(path.iterdir()):
            name = path.relative_to(folder).as_posix()
            found[name] = sha256(path) if plain else None
    return found
