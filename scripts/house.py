"""Write the map of the house, from the docstrings and imports of its rooms: README.md and docs/architecture.md.

``python scripts/house.py`` does it; ``--check`` only says whether it is to be done. A page says where each part goes:
``<!-- map -->``, ``<!-- drawing -->`` or ``<!-- files -->``, and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vdm_hub"
PAGES = ("README.md", "docs/architecture.md")


def floors() -> list[list[str]]:
    """The floors of import-linter's first contract from the ground up, each with its rooms."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [re.findall(r"vdm_hub\.(\w+)", layer) for layer in reversed(contracts[0]["layers"])]


def rooms() -> Iterator[Path]:
    """Each room from the ground up: a folder and those within it, or a file of its own."""
    for room in (PACKAGE / name for floor in floors() for name in floor):
        if room.is_dir():
            within = (one.parent for one in sorted(room.rglob("__init__.py")))
            yield from sorted(within, key=lambda one: -len(one.parts))  # which the room itself imports from
        else:
            yield room.with_suffix(".py")


def title(path: Path) -> str:
    """The first line of a docstring, its code in single backticks."""
    source = (path / "__init__.py" if path.is_dir() else path).read_text()
    said = ast.get_docstring(ast.parse(source))
    if not said:
        raise SystemExit(f"{path.relative_to(ROOT)} has no docstring: say in one line what it holds.")
    return re.sub(r"`+", "`", said.splitlines()[0]).replace("|", r"\|")


def files(room: Path) -> list[Path]:
    """The modules of a room, without those of the rooms within it."""
    return sorted(path for path in room.glob("*.py") if not path.name.startswith("__"))


def name(room: Path) -> str:
    """A room as the map calls it."""
    return f"{room.relative_to(PACKAGE)}{'/' if room.is_dir() else ''}"


def draw_map() -> str:
    """The rooms: what each holds, and the names of its files."""
    rows = (f"| `{name(room)}` | {title(room)} | {', '.join(one.stem for one in files(room))} |" for room in rooms())
    return "\n".join(["| room | what it holds | its files |", "| --- | --- | --- |", *rows])


def draw_files() -> str:
    """Every file with what it is, room by room."""
    lines: list[str] = []
    for room in filter(Path.is_dir, rooms()):
        lines += [f"### `{name(room)}`", "", title(room), ""]
        lines += [*(f"- `{one.name}`: {title(one)}" for one in files(room)), ""]
    return "\n".join(lines[:-1])


def draw_house() -> str:
    """The imports between rooms, as a graph in mermaid's language, without those that follow from others."""
    graph, names = grimp.build_graph("vdm_hub", cache_dir=None), [name for floor in floors() for name in floor]
    imports: dict[str, set[str]] = {one: set() for one in names}
    for one, other in itertools.permutations(names, 2):
        packages = {"importer": f"vdm_hub.{one}", "imported": f"vdm_hub.{other}"}
        if graph.direct_import_exists(**packages, as_packages=True):
            imports[one].add(other)
    reached: dict[str, set[str]] = {}
    for one in names:  # from the ground up, so that what lies below is known
        reached[one] = imports[one].union(*(reached[other] for other in imports[one]))
    arrows = [
        f"    {one} --> {other}"
        for one, other in itertools.product(reversed(names), repeat=2)
        if other in imports[one] and not any(other in reached[between] for between in imports[one])
    ]
    return "\n".join(["```mermaid", "graph TD", *arrows, "```"])


DRAWN = {"map": draw_map, "drawing": draw_house, "files": draw_files}


def redrawn(text: str) -> str:
    """A page with all that is drawn in it as it is now."""
    for what, draw in DRAWN.items():
        begin, end = f"<!-- {what} -->", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{draw()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Rewrite the pages, or say which are not as the package is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the exit status says whether all is well")
    check = parser.parse_args().check
    stale = [page for page in PAGES if redrawn((ROOT / page).read_text()) != (ROOT / page).read_text()]
    if not check:
        for page in stale:
            (ROOT / page).write_text(redrawn((ROOT / page).read_text()))
    sys.exit(f"not as the package is: {', '.join(stale)}; run python scripts/house.py" if check and stale else 0)


if __name__ == "__main__":
    main()
