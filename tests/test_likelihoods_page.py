"""docs/likelihoods.md: what it says to do on the digits works, and its example ranks images."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import ROOT, environment, finished_run
from vdm_hub import VDMPipeline
from vdm_hub.data.loading import load_split

PAGE = (ROOT / "docs" / "likelihoods.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if "runs/digits" in line]
(PYTHON,) = (text for kind, text in BLOCKS if kind == "python")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, done = finished_run()
    assert done.returncode == 0, done.stderr
    home = tmp_path_factory.mktemp("page")
    (home / "runs").mkdir()
    (home / "runs" / "digits").symlink_to(run)
    (home / "scripts").symlink_to(ROOT / "scripts")
    return home


def run_script(home: Path, script: str) -> str:
    """All in one process, as importing the libraries takes longer than the work."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=home, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_commands_and_the_example_run(home: Path) -> None:
    arguments = [shlex.split(line)[1:] for line in LINES if line.startswith("vdm-hub")]
    assert len(arguments) == 5
    script = f"from vdm_hub.commands import main\nprint([main(a) for a in {arguments!r}])\n{PYTHON}\nprint(ranked)"
    shown = run_script(home, script)
    assert "[0, 0, 0, 0, 0]" in shown
    ranked = re.findall(r"\d+", shown[shown.rindex("tensor(") :])
    assert sorted(map(int, ranked)) == list(range(20))


def test_images_are_ranked_and_others_scored(home: Path, tmp_path: Path) -> None:
    """Outliers that are noise; how they rank is this model's affair, which hardly was trained."""
    (tmp_path / "noise" / "test").mkdir(parents=True)
    source, pixels = np.random.default_rng(0), np.round(np.arange(17) * 255 / 16).astype(np.uint8)
    for i in range(12):
        Image.fromarray(pixels[source.integers(0, 17, (8, 8))]).save(tmp_path / "noise" / "test" / f"{i}.png")
    (line,) = (line for line in LINES if "rank_images" in line)
    words = [*shlex.split(line)[1:], "--outliers", str(tmp_path / "noise")]
    words[words.index("--split") + 1] = "test[:12]"
    picture = tmp_path / "ranking.png"
    words[words.index("--picture") + 1] = str(picture)
    shown = run_script(
        home, f"import runpy, sys\nsys.argv = {words!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert "digits, test[:12]: " in shown and "noise, test[:12]: " in shown and "bits/dim" in shown
    area = re.search(r"AUROC of 'less likely' as a sign of .*noise: ([0-9.]+)", shown)
    assert area is not None
    pipe = VDMPipeline.from_pretrained(home / "runs" / "digits" / "pipeline")
    own, other = (
        pipe.log_likelihood(load_split(name, "test[:12]", num_levels=17).levels).per_image
        for name in ("digits", str(tmp_path / "noise"))
    )
    assert float(area[1]) == pytest.approx(float((other[:, None] > own).double().mean()), abs=6e-4)
    for measured in (own, other):
        assert f": {float(measured.mean()):.3f} bits/dim" in shown
    assert Image.open(picture).width > 800
