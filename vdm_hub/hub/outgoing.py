"""The search of a folder for secrets before it leaves this machine, by whichever command or method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects  # type: ignore[attr-defined]
from PIL import Image

from vdm_hub.errors import PublishError, explained
from vdm_hub.errors.secret_values import find_secret, find_secret_in_bytes
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.places import INDEX

_PARSERS: Mapping[str, Callable[[str], object]] = {".json": json.loads, ".yaml": yaml.safe_load}


class SearchedUpload:
    """Put before diffusers' ``PushToHubMixin``: what a component sends is searched for secrets first."""

    def _upload_folder(self, working_dir: Any, repo_id: str, *arguments: Any, **kwargs: Any) -> Any:
        make_public(Path(working_dir), (repo_id, *arguments[1:], kwargs.get("commit_message")))
        return super()._upload_folder(working_dir, repo_id, *arguments, **kwargs)  # type: ignore[misc]


def make_public(folder: Path, texts: object = ()) -> None:
    """Take out of a folder where its model lay, and refuse to send secrets.

    Args:
        folder: All of it is sent, but what the client leaves out, such as ``.git``.
        texts: What is sent besides: names and words.

    Raises:
        PublishError: With the file's name and the kind of secret, and never the secret.
    """
    if what := find_secret(texts):
        raise PublishError(f"the name or the message of the commit holds {what}: nothing was sent. Leave it out.")
    forget_places(folder)
    refuse_secrets(folder)


def forget_places(folder: Path) -> None:
    """Take out of the configs of a model where it was loaded from, which diffusers notes there."""
    for path in (*folder.glob(INDEX), *folder.glob("*config.json"), *folder.glob("*/*config.json")):
        config = read_json(path)
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def refuse_secrets(folder: Path) -> None:
    """Refuse to send a file that holds a secret, in its text or in what a picture or weights say of themselves.

    Raises:
        PublishError: With the file's name and the kind of secret, and never the secret.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in sorted(filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS)):
        if what := find_secret(name) or _secret_in(folder / name):
            raise PublishError(
                f"{name} would hold {what}: nothing was sent. Take it out of the recipe or the file that it came "
                f"from, and revoke it if others may have seen it."
            )


def _secret_in(path: Path) -> str | None:
    """The kind of secret in a file, which is read as files of its kind are."""
    if path.suffix == ".safetensors":
        header = _header(path)
        return find_secret_in_bytes(header) or find_secret(_parsed(header, json.loads))
    content = path.read_bytes()
    if path.suffix == ".png":
        unreadable = explained(
            f"{path.name} is no PNG that can be read", "draw it again, or take it away", PublishError
        )
        with unreadable, Image.open(path, formats=("PNG",)) as picture:
            picture.load()  # what it says of itself may stand at its end
            return find_secret_in_bytes(content) or find_secret([picture.info, dict(picture.getexif())])
    if path.suffix == ".py":  # this package's own code, compared with what it is; it speaks of tokens
        return find_secret_in_bytes(content)
    return find_secret(_parsed(content, _PARSERS.get(path.suffix, str))) or find_secret_in_bytes(content)


def _parsed(content: bytes, parser: Callable[[str], object]) -> object:
    """The content as a parser reads it; the text itself where no parser can."""
    text = content.decode("utf-8", errors="replace")
    try:
        return parser(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return text


def _header(weights: Path) -> bytes:
    """The JSON before the weights in a safetensors file."""
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 100_000_000))
