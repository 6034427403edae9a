"""The files that commands write."""

from __future__ import annotations

from pathlib import Path

from vdm_hub.errors import ConfigurationError
from vdm_hub.files import destination


def check_output(path: Path, option: str, suffix: str, *, overwrite: bool) -> None:
    """Refuse, before there is anything to write, a place where no file of this kind can be written.

    Args:
        path: The place.
        option: The option that named it.
        suffix: What the file's name must end in, in any case, such as ``.png``.
        overwrite: Whether a plain file that is there may be replaced.

    Raises:
        OutputError: There is a device, a pipe or a socket.
        ConfigurationError: There is a folder, or a file that may not be replaced; or the name is another kind's.
    """
    target = destination(path)
    if target.is_dir() or path.suffix.casefold() != suffix:
        what = "a folder" if target.is_dir() else "of another kind"
        raise ConfigurationError(f"--{option} {path} is {what}: name a file that ends in {suffix}.")
    if target.exists() and not overwrite:
        raise ConfigurationError(f"{path} exists: name another --{option}, or replace it with --overwrite.")
