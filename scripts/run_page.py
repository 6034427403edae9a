"""Run the Python of a documentation page, block after block, in one process.

A block that begins with an import starts anew: nothing of those above it is known there.

``python scripts/run_page.py docs/ladder/1_vae.md`` leaves the page's pictures in ``docs/images``; ``--folder`` puts
them elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def main() -> None:
    """Execute the blocks, each compiled with its place in the page, so that a traceback names the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--folder", type=Path, help="where pictures are written (default: docs/images)")
    arguments = parser.parse_args()
    page = arguments.page.resolve()
    text = page.read_text(encoding="utf-8")
    os.chdir(arguments.folder or Path(__file__).parents[1] / "docs" / "images")
    names: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        if block.group(1).startswith(("import ", "from ")):
            names = {"__name__": "__main__"}
        lines_above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_above + block.group(1), str(page), "exec"), names)


if __name__ == "__main__":
    main()
