"""Rows of texts in JSON Lines and CSV files, read by pyarrow, each opened by its own name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from vdm_hub.data.files import Listing, describe_unused
from vdm_hub.data.layouts import refuse_doubled
from vdm_hub.data.sources import SourceInMemory, check_memory
from vdm_hub.errors import DataError, explained

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
ROW_SUFFIXES = frozenset((*_LINES, *_TABLES))
"""The suffixes of files that hold a row a line."""

_BLOCK = 64 << 20  # bytes; no line is longer


class RowFiles(SourceInMemory):
    """JSON Lines and CSV files, whose rows have columns."""

    def __init__(self, name: str, splits: Mapping[str, Sequence[Path]], listing: Listing | None = None) -> None:
        super().__init__(name)
        self._files, self._listing = splits, listing

    @property
    def note(self) -> str:
        """What in the folder is not read."""
        return f" Not used: {describe_unused(self._listing.unused)}." if self._listing and self._listing.unused else ""

    @cached_property
    def _splits(self) -> Mapping[str, datasets.Dataset]:
        files = [path for paths in self._files.values() for path in paths]
        check_memory(sum(path.stat().st_size for path in files), f"the rows of {self.name!r}", "write them as Parquet")
        return {
            split: datasets.concatenate_datasets([datasets.Dataset(_table(path)) for path in paths])
            for split, paths in self._files.items()
        }


def _table(path: Path) -> pa.Table:
    suffix = path.suffix.casefold()
    with explained(f"the rows of {str(path)!r} can't be read", "mend that file, or take it out", DataError):
        if suffix in _LINES:
            found = pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=_BLOCK))
        else:
            how = pyarrow.csv.ParseOptions(delimiter=_TABLES[suffix], newlines_in_values=True)
            found = pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(block_size=_BLOCK), how)
    refuse_doubled(found.column_names, path)
    return found
