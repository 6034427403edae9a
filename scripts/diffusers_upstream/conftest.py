"""Settings for diffusers' own tests of our classes; run them by `make test-diffusers`."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: what needs the network is skipped by name
torch.set_num_threads(1)

# Upstream's own conftest also puts the checkout's `src` first on the path; it is not loaded from here, so that the
# installed diffusers is what is tested. Only its markers are needed.
MARKERS = (
    "attention autoround bitsandbytes compile context_parallel cpu_offload gguf group_offload ip_adapter lora memory "
    "modelopt nightly quantization quanto sdnq single_file slow tensor_parallel torchao training"
)

# Upstream's pipeline tests import helpers from modules whose own tests, not run here, need these two packages.
STUBS = {
    "parameterized": {"parameterized": types.SimpleNamespace(expand=lambda *_, **__: lambda test: test)},
    "requests_mock": {},
}
for name, contents in STUBS.items():
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: diffusers'")


@pytest.fixture(scope="module", autouse=True)
def random_weights() -> Iterator[None]:
    """Branches that start from zero start at random: the untrained network would be the identity and prove nothing."""
    from vdm_hub import UNetVDMModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[UNetVDMModel.forward.__module__], "_zero", lambda module: module)
        yield
