"""A Space on the Hub: one commit of all its files."""

from __future__ import annotations

from pathlib import Path

from vdm_hub.errors import PublishError
from vdm_hub.hub.outgoing import refuse_secrets
from vdm_hub.publishing.repository import MAIN, HubRepository
from vdm_hub.spaces.writing import MODEL, TOLD
from vdm_hub.version import __version__


def push_space(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Make a Space hold the files of a folder, by one commit; what its owner added beside them stays.

    Args:
        folder: As `write_space` wrote it.
        repo_id: ``owner/name``; made where there is none.
        private: Whether a new Space is private.

    Returns:
        Its address.

    Raises:
        PublishError: The Hub, or the token, did not let it happen; it holds an app of somebody's own; or a file holds
            a secret.
    """
    refuse_secrets(folder)
    repository = HubRepository(repo_id, repo_type="space")
    repository.create(private)
    parent = repository.head(MAIN)
    there = repository.files(parent)
    if "app.py" in there and TOLD not in there:
        raise PublishError(
            f"{repo_id} holds an app.py that this package did not write, as there is no {TOLD} beside it: nothing was "
            f"pushed. Name another Space, or remove that app first."
        )
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stale = sorted(path for path in there if path.startswith(f"{MODEL}/") and path not in here)
    repository.commit(folder, f"A Space by vdm_hub {__version__}", MAIN, parent, stale)
    return repository.url
