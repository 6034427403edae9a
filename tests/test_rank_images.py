"""``scripts/rank_images.py`` of docs/likelihoods.md ranks the images of one data set, and scores those of another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import ROOT, environment, finished_run
from vdm_hub import VDMPipeline
from vdm_hub.data.loading import load_split


def test_images_are_ranked_and_others_scored(tmp_path: Path) -> None:
    """Outliers that are noise; how they rank is this model's affair, which hardly was trained."""
    (tmp_path / "noise" / "test").mkdir(parents=True)
    source, pixels = np.random.default_rng(0), np.round(np.arange(17) * 255 / 16).astype(np.uint8)
    for i in range(12):
        Image.fromarray(pixels[source.integers(0, 17, (8, 8))]).save(tmp_path / "noise" / "test" / f"{i}.png")
    pipeline, picture = finished_run()[0] / "pipeline", tmp_path / "ranking.png"
    words = [str(pipeline), "digits", "--split", "test[:12]", "--outliers", str(tmp_path / "noise")]
    command = [sys.executable, str(ROOT / "scripts" / "rank_images.py"), *words, "--picture", str(picture)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "digits, test[:12]: " in shown and "noise, test[:12]: " in shown and "bits/dim" in shown
    area = re.search(r"AUROC of 'less likely' as a sign of .*noise: ([0-9.]+)", shown)
    assert area is not None
    pipe = VDMPipeline.from_pretrained(pipeline)
    own, other = (
        pipe.log_likelihood(load_split(name, "test[:12]", num_levels=17).levels).per_image
        for name in ("digits", str(tmp_path / "noise"))
    )
    assert float(area[1]) == pytest.approx(float((other[:, None] > own).double().mean()), abs=6e-4)
    for measured in (own, other):
        assert f": {float(measured.mean()):.3f} bits/dim" in shown
    assert Image.open(picture).width > 800
