"""The last step of a run that was asked to publish: ``--push_to_hub``."""

from __future__ import annotations

import shlex

from vdm_hub.errors import PublishError, in_one_line
from vdm_hub.publishing.publishing import check_ready, publish
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.state.outputs import OutputFolder


def check_publishing(configuration: Configuration) -> None:
    """Find out before training what would stop the publication after it.

    Raises:
        VDMHubError: There is no token, or the repository has no valid name.
    """
    if configuration.training.push_to_hub:
        check_ready(configuration.training.hub_repository)


def publish_run(configuration: Configuration, folder: OutputFolder) -> None:
    """Publish what a finished run left in its folder, where it was asked to, and print where.

    Raises:
        PublishError: It did not succeed; the run is complete on disk, and the message says how to go on.
    """
    training = configuration.training
    if not training.push_to_hub:
        return
    repository, private = training.hub_repository, training.hub_private_repo or None
    try:
        publication = publish(folder.pipeline, repository, private=private)
    except Exception as error:  # whatever it was, the run is whole, and its owner must hear that
        reason = in_one_line(error).rstrip(".")
        words = ["vdm-hub", "publish", str(folder.pipeline), repository, *(["--private"] if private else [])]
        raise PublishError(
            f"{reason}. The run itself is complete in {folder.path}: once that is mended, go on with "
            f"`{shlex.join(words)}`."
        ) from error
    print(f"{'hub':<13}{publication.url}")
    if publication.no_results:
        print(f"{'results':<13}no figure where the Hub reads results: {publication.no_results}.")
