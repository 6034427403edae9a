"""``push_to_hub`` that leaves a published model card alone."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

from vdm_hub.hub.install_hint import add_install_hint
from vdm_hub.hub.outgoing import make_public
from vdm_hub.hub.weights import replacing_weights

CARD = "README.md"


class KeepsPublishedCard:
    """Put before `DiffusionPipeline`, whose own ``push_to_hub`` writes over the repository's card.

    A repository without a card gets diffusers' own, or the one that lies in the folder. Everything is one commit.
    """

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload the pipeline alone; ``vdm-hub publish`` brings a card with figures and pictures too.

        Args:
            repo_id: ``owner/name``, or a name in the token's own namespace.
            commit_message: Title of the commit.
            private: Whether a new repository is private.
            token: Instead of the one that the client has stored.
            create_pr: Open a pull request instead.
            safe_serialization: Whether to save weights as safetensors, the only ones that this package loads.
            variant: Of the weights' file names, such as ``fp16``.
            subfolder: Where in the repository.

        Returns:
            The commit's address.

        Raises:
            PublishError: It would send a secret.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._upload(Path(folder), repo_id, private, token, commit_message, create_pr, subfolder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save to a folder, and upload the folder if ``push_to_hub``.

        Args:
            save_directory: The folder.
            safe_serialization: Whether to save weights as safetensors, the only ones that this package loads.
            variant: Of the weights' file names, such as ``fp16``.
            max_shard_size: Of a file of weights, such as ``"5GB"``.
            push_to_hub: Whether to upload the folder then, as `push_to_hub` does.
            kwargs: ``repo_id`` (the folder's name if not given), ``private``, ``token``, ``commit_message`` and
                ``create_pr`` of `push_to_hub`.
        """
        upload = {key: kwargs.pop(key, None) for key in ("commit_message", "private", "create_pr", "token", "repo_id")}
        with ExitStack() as stack:
            for name in self.components:  # type: ignore[attr-defined]
                stack.enter_context(replacing_weights(Path(save_directory) / name, variant))
            super().save_pretrained(  # type: ignore[misc]
                save_directory,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                **kwargs,
            )
        if push_to_hub:
            folder, token = Path(save_directory), upload["token"]
            name = upload["repo_id"] or folder.resolve().name
            self._upload(folder, name, upload["private"], token, upload["commit_message"], bool(upload["create_pr"]))

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        private: bool | None,
        token: str | bool | None,
        message: str | None,
        create_pr: bool,
        subfolder: str | None = None,
    ) -> str:
        add_install_hint(folder)
        make_public(folder, (repo_id, message, subfolder))
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        published = huggingface_hub.file_exists(repo_id, CARD, token=token)
        if not (published or subfolder or (folder / CARD).is_file()):
            populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True)).save(folder / CARD)
        return huggingface_hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            ignore_patterns=[CARD] if published and not subfolder else None,
            commit_message=message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            token=token,
        )
