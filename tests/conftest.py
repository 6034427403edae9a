"""Session settings, and real data where it is to be had."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

import fork_server

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: no test may need the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `runs.environment` says, or no process would be a fork
torch.set_num_threads(1)
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("laws")
# For `make mutants`: that something fails is all that is asked, not the smallest example.
settings.register_profile("one_failure", settings.get_profile("laws"), phases=[Phase.explicit, Phase.generate])

DATA_VARIABLE = "VDM_HUB_TEST_DATA"


def pytest_configure(config: pytest.Config) -> None:
    fork_server.install(getattr(config, "workerinput", {}).get("fork servers"))


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage; to look for some among a million objects takes longer than the tests."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Each worker of pytest-xdist forks from the servers that there are."""
    node.workerinput["fork servers"] = fork_server.Popen.servers


@pytest.fixture(scope="module")
def token_plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A process of tokens, `tiny_tokens`, as a plugin that is installed in this folder while a module's tests run."""
    import tiny_tokens  # only here, as it takes transformers along

    with pytest.MonkeyPatch.context() as patch:
        folder = tiny_tokens.install(tmp_path_factory.mktemp("plugin") / "site-packages")
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder that holds ``cifar10/``, ``mnist/``, ... as Parquet; the test skips where there is none."""
    beside_the_repository = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(DATA_VARIABLE, beside_the_repository))
    if not folder.is_dir():
        pytest.skip(f"REAL DATA ABSENT, THIS ORACLE WAS NOT CHECKED: {folder} is no folder; set {DATA_VARIABLE}.")
    return folder
