"""Imports a package from text. A generated ``pipeline.py`` starts with this code; see `publishing.remote_code`."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any


class CarriedPackage(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """A finder and loader of the modules of one package, whose name no other package has.

    It keeps all it needs itself: diffusers runs every ``pipeline.py`` in one and the same module.

    Args:
        name: The package's name.
        sources: The source of each module, by its name in the package; that of the package itself is "".

    >>> package = CarriedPackage("carried_1f3c", {"": "from . sums import two", "sums": "two = 1 + 1"}).load()
    >>> package.two, sys.modules["carried_1f3c.sums"].two
    (2, 2)
    """

    def __init__(self, name: str, sources: Mapping[str, str]) -> None:
        self.sources = {f"{name}.{module}".rstrip("."): source for module, source in sources.items()}
        self.name = name

    def load(self) -> Any:
        """The package, imported once in a process, whichever file asks for it."""
        if self.name not in sys.modules and importlib.util.find_spec(self.name) is None:
            sys.meta_path.append(self)
        return importlib.import_module(self.name)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of ours; ``None`` for any other that Python's import system asks for."""
        return importlib.util.spec_from_loader(fullname, self) if fullname in self.sources else None

    def is_package(self, fullname: str) -> bool:
        """Whether other modules are inside."""
        return any(module.startswith(f"{fullname}.") for module in self.sources)

    def get_filename(self, fullname: str) -> str:
        """The file name that a traceback shows; there is no such file."""
        return fullname.replace(".", "/") + ("/__init__.py" if self.is_package(fullname) else ".py")

    def get_source(self, fullname: str) -> str:
        """The text of a module, which a traceback quotes."""
        return self.sources[fullname]
