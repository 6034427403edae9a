"""Settings for diffusers' own tests of our classes; run them by `make test-diffusers`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: what needs the network is skipped by name
torch.set_num_threads(1)

# Upstream's own conftest also puts the checkout's `src` first on the path; it is not loaded from here, so that the
# installed diffusers is what is tested. Only its markers are needed.
MARKERS = "training memory cpu_offload group_offload slow nightly"


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: diffusers'")


@pytest.fixture(scope="module", autouse=True)
def random_weights() -> Iterator[None]:
    """Branches that start from zero start at random: the untrained network would be the identity and prove nothing."""
    from vdm_hub.models import unet_vdm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet_vdm, "_zero", lambda module: module)
        yield
