"""The scripts that figures were measured with start: each imports what it needs, and says what it takes."""

from __future__ import annotations

import json
from pathlib import Path

from runs import ROOT, python

FOLDER = ROOT / "scripts" / "bench"
START_ALL = """
import contextlib, io, json, runpy, sys
from pathlib import Path

ended = {}
for path in map(Path, sys.argv[1:]):
    sys.argv[:] = [str(path), "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        ended[path.name] = str(error.code or "")
    except Exception as error:
        ended[path.name] = f"{type(error).__name__}: {error}"
print("ENDED" + json.dumps(ended))
"""


def test_each_starts(tmp_path: Path) -> None:
    """Or says which plugin it needs, where that is not installed."""
    (tmp_path / "start_all.py").write_text(START_ALL)
    scripts = sorted(str(path) for path in FOLDER.glob("*.py"))
    done = python("start_all", *scripts, PYTHONPATH=f"{tmp_path}:{FOLDER}:{ROOT}")
    assert done.returncode == 0, done.stderr[-2000:]
    ended = json.loads(done.stdout.rpartition("ENDED")[2])
    wrong = {name: how for name, how in ended.items() if how and "vdm_hub_" not in how and "vdm-hub-" not in how}
    assert not wrong
