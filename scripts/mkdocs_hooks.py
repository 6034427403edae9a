"""How mkdocs.yml makes a site of this repository: which files are its pages, and how docstrings are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "docs/**/*", "plugins/**/README.md", "model_cards/**/*", "scripts/*/README.md")
DOCTEST = re.compile(r"^>>> .*(?:\n.*\S.*)*", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """The files of the site lie as those of the repository do, so that the links between them hold in both."""
    for file in files.documentation_pages() + files.media_files():
        if Path(file.src_dir or "") == Path(config.docs_dir):
            files.remove(file)
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()}):
        name = str(path.relative_to(ROOT))
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


class Examples(Extension):
    """Examples are shown as code, with a heading in the docstring (``Example:``) or without one."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Write them as griffe reads them."""
        if obj.docstring:
            text = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = DOCTEST.sub(lambda example: f"```pycon\n{example[0]}\n```", text)
