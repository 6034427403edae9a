"""What a published pipeline's index tells readers without this package: what to install.

From a Hub id, diffusers looks in ``diffusers.pipelines`` for the library of every entry of ``model_index.json`` that
is a list, in order, and an error names the first that is not there. So a repository's first such entry, which nothing
else reads, is an instruction.
"""

from __future__ import annotations

import json
from pathlib import Path

from vdm_hub.files import written_beside
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.places import INDEX
from vdm_hub.version import HOW_TO_INSTALL

HINT_KEY = "_requires"
INSTALL_HINT = (
    f"the package vdm_hub: install it ({HOW_TO_INSTALL}), and `import vdm_hub` before you load. Without it, vdm_hub"
)
"""Wire format, as published repositories hold it: diffusers adds ".py as defined in ... does not exist in ..."."""

FORMER_HINTS = (
    "the package vdm_hub: run `pip install vdm-hub`, and `import vdm_hub` before you load. Without it, vdm_hub",
)
"""The hints of earlier versions: a version that does not know a hint can't load a pipeline that holds it."""


def add_install_hint(folder: Path) -> None:
    """Tell readers without this package what to install: in the index of a pipeline's folder, before it is published.

    Readers with this package, and those who load the folder itself, notice nothing of it; saved again, it is gone.

    Args:
        folder: The pipeline.

    Raises:
        CheckpointError: The folder's index is damaged.
        OSError: There is none.
    """
    path = folder / INDEX
    index = read_json(path)
    first = {key: value for key, value in index.items() if not isinstance(value, list)}
    hinted = first | {HINT_KEY: [INSTALL_HINT, None]} | {key: index[key] for key in index if key != HINT_KEY}
    with written_beside(path) as beside:
        beside.write_text(json.dumps(hinted, indent=2) + "\n", encoding="utf-8")
