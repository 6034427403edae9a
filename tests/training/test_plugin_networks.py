"""A recipe with the network of a plugin: its package is named, and what can't take the data is refused at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributions import write_metadata
from naming import naming, paragraph
from plugin_of_law_7 import LogitsProcess, ResamplingProcess
from runs import configuration, train_here
from vdm_hub import VDMPipeline, registry
from vdm_hub.errors import ConfigurationError, MissingPluginError
from vdm_hub.publishing.wording import plugin_packages
from vdm_hub.recipes.arguments import Configuration, parse_recipe
from vdm_hub.recipes.configuration import differences
from vdm_hub.training.parts.networks import build_network

ONE, TWO = "vdm-hub-nets", "vdm-hub-other-nets"
SOURCE = """
import torch
from plugin_of_law_7 import PixelNetwork


class Sound(PixelNetwork):
    pass


class OneChannel(PixelNetwork):
    def forward(self, sample, timestep, return_dict=True, context=None):
        return (super().forward(sample, timestep, return_dict, context)[0][:, :1],)


class Halved(PixelNetwork):
    def forward(self, sample, timestep, return_dict=True, context=None):
        return (super().forward(sample, timestep, return_dict, context)[0][..., ::2],)


class Raising(PixelNetwork):
    def forward(self, sample, timestep, return_dict=True, context=None):
        raise KeyError("no such table")


class Draws(PixelNetwork):
    def forward(self, sample, timestep, return_dict=True, context=None):
        return (super().forward(sample, timestep, return_dict, context)[0] + torch.randn(()).to(sample),)


class NoTensor(PixelNetwork):
    def forward(self, sample, timestep, return_dict=True, context=None):
        return (None,)


class Unbuildable(PixelNetwork):
    def __init__(self, width: int = 8) -> None:
        raise LookupError("no weights there")


from diffusers.configuration_utils import register_to_config


class Silent(PixelNetwork):
    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)
        self._internal_dict = type(self._internal_dict)({"width": width})


class Fixed(PixelNetwork):  # its config is its parent's, whose defaults it has
    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 8) -> None:
        super().__init__()
"""
NAMES = ("Sound", "OneChannel", "Halved", "Raising", "Draws", "NoTensor", "Unbuildable", "Silent", "Fixed")


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    site.mkdir()
    for package, names in ((ONE, NAMES), (TWO, ("Sound",))):
        module = package.replace("-", "_")
        (site / f"{module}.py").write_text(SOURCE)
        points = "".join(f"{name} = {module}:{name}\n" for name in names)
        write_metadata(site, package, "0.3", f"[vdm_hub.networks]\n{points}")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(site)
    yield
    for package in (ONE, TWO):
        sys.modules.pop(package.replace("-", "_"), None)


def built(folder: Path, name: str, shape: Any = (1, 8, 8), process: Any = None, **more: Any) -> Any:
    unet = {"_class_name": name, **more}
    return build_network(configuration(folder, unet=unet), shape, process or ResamplingProcess())


# ---- its package ----------------------------------------------------------------------------------------------------


def test_a_name_of_two_packages_is_decided_by_the_package(tmp_path: Path) -> None:
    text = paragraph(ConfigurationError, lambda: built(tmp_path, "Sound"))
    assert ONE in text and TWO in text and "_package" in text
    for package in (ONE, TWO, TWO.upper()):
        found = built(tmp_path, "Sound", _package=package)
        assert type(found).__module__ == package.lower().replace("-", "_")


@pytest.mark.parametrize(
    ("said", "error", "named"),
    [
        ({"_class_name": "Halved", "_package": "vdm-hub-unheard-of"}, MissingPluginError, "vdm-hub-unheard-of"),
        ({"_class_name": "Halved", "_package": TWO}, MissingPluginError, TWO),
        ({"_class_name": "UNet2DModel", "_package": "vdm-hub-unheard-of"}, MissingPluginError, "vdm-hub-unheard-of"),
        ({"_class_name": "UNetVDMModel", "_package": ONE}, ConfigurationError, ONE),
        ({"_class_name": "Halved", "_package": "a/b"}, ConfigurationError, "a/b"),
        ({"_class_name": "Halved", "_package": 3}, ConfigurationError, "3"),
        ({"_class_name": "Halve"}, ConfigurationError, "did you mean 'Halved'"),
    ],
)
def test_a_package_that_does_not_bring_it_is_named(
    said: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    assert named in paragraph(error, lambda: configuration(tmp_path, unet=said))


def test_the_recipe_and_the_card_of_a_run_name_the_package(tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_here(output, unet={"_class_name": "Draws"}, max_train_steps=1)
    kept = parse_recipe([str(output / "recipe.yaml")])
    assert json.loads(kept.model.unet) == {"_class_name": "Draws", "_package": ONE}
    assert registry.packages(kept.to_dict()) == {ONE: "0"}
    assert differences(kept.to_dict(), configuration(output, unet={"_class_name": "Draws"}).to_dict()) == []
    assert plugin_packages(VDMPipeline.from_pretrained(output / "pipeline")) == {ONE: "0.3"}


def test_without_it_the_recipe_of_a_run_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = configuration(tmp_path, unet={"_class_name": "Halved"}).to_yaml()
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path / "site")])
    text = paragraph(MissingPluginError, lambda: parse_recipe([str(tmp_path / "recipe.yaml")]))
    assert f"pip install {ONE}" in text


def test_a_built_in_and_one_of_diffusers_have_none(tmp_path: Path) -> None:
    for name in ("UNetVDMModel", "UNet2DModel"):
        assert json.loads(configuration(tmp_path, unet={"_class_name": name}).model.unet) == {"_class_name": name}


def test_a_package_on_the_command_line_is_another_class(tmp_path: Path) -> None:
    said = {"_class_name": "Sound", "_package": ONE, "width": 4}
    path = tmp_path / "mine.yaml"
    path.write_text(configuration(tmp_path, unet=said).to_yaml())
    words = ["--unet", json.dumps({"_class_name": "Sound", "_package": TWO})]
    with pytest.warns(UserWarning, match=naming(ONE, TWO, "width")):
        changed: Configuration = parse_recipe([str(path), *words])
    assert (changed.model.unet_package, changed.model.unet_config) == (TWO, {})
    assert parse_recipe([str(path), "--unet.width", "6"]).model.unet_package == ONE


# ---- what it takes and gives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "process", "named"),
    [
        ("OneChannel", (3, 8, 8), ResamplingProcess(), ("OneChannel", "1x8x8", "3x8x8")),
        ("Halved", (1, 8, 8), ResamplingProcess(), ("Halved", "1x8x4", "1x8x8")),
        ("OneChannel", (1, 8, 8), LogitsProcess(5), ("OneChannel", "1x8x8", "5x8x8")),
        ("Fixed", (1, 8, 8), LogitsProcess(5), ("Fixed", "1x8x8", "5x8x8")),
        ("Fixed", (3, 8, 8), ResamplingProcess(), ("Fixed", "3x8x8", "in_channels=1")),
        ("Raising", (1, 8, 8), ResamplingProcess(), ("Raising", "1x8x8", "KeyError", "no such table")),
        ("NoTensor", (1, 8, 8), ResamplingProcess(), ("NoTensor", "NoneType", "1x8x8")),
        ("Unbuildable", (1, 8, 8), ResamplingProcess(), ("Unbuildable", "no weights there")),
        ("Silent", (1, 8, 8), ResamplingProcess(), ("Silent", "in_channels", "1x8x8")),
    ],
)  # fmt: skip
def test_what_can_t_take_the_data_is_refused_before_a_step(
    name: str, shape: Any, process: Any, named: tuple[str, ...], tmp_path: Path
) -> None:
    text = paragraph(ConfigurationError, lambda: built(tmp_path, name, shape, process))
    assert all(word in text for word in named), text


def test_a_run_of_one_ends_before_its_folder_is_written(tmp_path: Path) -> None:
    paragraph(ConfigurationError, lambda: train_here(tmp_path / "run", unet={"_class_name": "Halved"}))
    assert not (tmp_path / "run").exists()


def test_the_call_that_tells_changes_no_draw(tmp_path: Path) -> None:
    for name, said in (("Draws", {}), ("UNetVDMModel", {"block_out_channels": [8], "norm_num_groups": 4})):
        torch.manual_seed(3)
        network = built(tmp_path, name, **said)
        state, drawn = torch.get_rng_state(), network.state_dict()
        torch.manual_seed(3)
        alone = type(network)(**{**network.config})
        assert torch.equal(torch.get_rng_state(), state)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(drawn[key], value, rtol=0, atol=0)
