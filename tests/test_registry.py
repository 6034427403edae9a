"""Names become classes through installed distributions only; what is wrong is said with what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fork_server
import registered
from distributions import write_metadata
from naming import paragraph
from vdm_hub import registry
from vdm_hub.errors import ConfigurationError, MissingPluginError

KINDS = sorted(registry.BUILT_INS)
Install = Callable[..., None]

PLUGIN = """
from vdm_hub.diffusion.noise_schedules import LinearSchedule


class Steep(LinearSchedule):
    def __init__(self, gamma_max: float = 7.0) -> None:
        super().__init__(-9.0, gamma_max)

    def to_config(self):
        return {"gamma_max": self.gamma_max}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one entry point on sys.path, as pip would: real metadata, real import."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(
        package: str, name: str, target: str | None = None, version: str = "1.2", kind: str = "noise_schedules"
    ) -> None:
        module = f"plugin_of_{package.replace('-', '_').replace('.', '_')}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(PLUGIN)
        entry_points = f"[vdm_hub.{kind}]\n{name} = {target or f'{module}:Steep'}\n"
        write_metadata(tmp_path, package, version, entry_points)

    return put


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_name_resolves_to_a_class_of_its_kind(kind: str) -> None:
    for registration in registry.registrations(kind):
        assert isinstance(registration.load(), type)
        assert registry.lookup(kind, registration.name).target == registration.target


@pytest.mark.parametrize(
    "kind", sorted({*KINDS} - {"forward_processes", "networks"})
)  # diffusers saves a network's config
def test_every_instance_survives_its_serialised_form(kind: str) -> None:
    for name in registered.names(kind):
        instance = registered.build(kind, name)
        serialised = json.loads(json.dumps(registry.serialise(kind, instance)))
        for form in (serialised, json.dumps(serialised) if isinstance(serialised, dict) else serialised):
            again = registry.build(kind, form)
            assert type(again) is type(instance) and again.to_config() == instance.to_config()


def test_a_built_in_with_default_arguments_is_its_name_and_only_others_are_written_out() -> None:
    assert registry.serialise("noise_schedules", registry.build("noise_schedules", "cosine")) == "cosine"
    form = {"name": "cosine", "config": {"gamma_max": 8.0}}
    assert registry.serialise("noise_schedules", registry.build("noise_schedules", form)) == form


def test_defaults_fill_only_what_the_form_leaves_out_and_the_class_accepts() -> None:
    form = {"name": "linear", "config": {"gamma_max": 8.0}}
    built = registry.build("noise_schedules", form, gamma_min=-9.0, gamma_max=1.0, betas=[0.1])
    assert built.to_config() == {"gamma_min": -9.0, "gamma_max": 8.0}


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        ("noise_schedules", "cosin", "cosine"),
        ("parameterizations", "v-prediction", "v_prediction"),
        ("conditionings", "afine", "affine"),
        ("decoders", "factorized", "factorised"),
        ("forward_processes", "gausian", "gaussian"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_known(kind: str, name: str, nearest: str) -> None:
    text = paragraph(ConfigurationError, lambda: registry.build(kind, name))
    assert repr(name) in text and f"did you mean '{nearest}'" in text
    assert all(known in text for known in registry.BUILT_INS[kind])


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    assert "noise_schedules" in paragraph(ConfigurationError, lambda: registry.registrations("noise_schedule"))


@pytest.mark.parametrize(
    ("serialised", "words"),
    [
        ('{"name": "linear"', ["neither a name nor a JSON object"]),
        ('{"nome": "linear"}', ["name", "nome"]),
        ({"name": 3}, ["3"]),
        (["linear"], ["linear", "object"]),
        (None, ["None"]),
        ({"name": "linear", "confg": {}}, ["'confg'", "did you mean 'config'"]),
        ({"name": "linear", "config": [1]}, ["[1]", "give an object"]),
        ({"name": "linear", "config": {"gama_min": 1}}, ["'gama_min'", "did you mean 'gamma_min'"]),
        ({"name": "linear", "config": {"gamma_min": "low"}}, ["linear", "gamma_min"]),
        ({"name": "tabulated"}, ["gammas"]),
        ({"name": "tabulated", "config": {"gammas": "abc"}}, ["tabulated", "gammas"]),
    ],
)
def test_a_bad_form_is_refused_with_what_it_holds(serialised: Any, words: list[str]) -> None:
    text = paragraph(ConfigurationError, lambda: registry.build("noise_schedules", serialised))
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "package",
    [
        "../evil",
        "/etc/passwd",
        "a/b",
        "https://x.org/p.tar.gz",
        "p[extra]",
        "p @ http",
        "-r",
        "p\n",
        "",
        ".",
        "p;q",
        7,
    ],
)
def test_package_names_that_are_paths_addresses_or_options_are_refused(package: Any) -> None:
    form = {"name": "steep", "package": package}
    text = paragraph(ConfigurationError, lambda: registry.build("noise_schedules", form))
    assert "no valid name" in text and "pip install" not in text


def test_a_plugin_is_found_built_and_serialised_with_its_package_and_version(install: Install) -> None:
    install("vdm-hub-steep", "steep")
    built = registry.build("noise_schedules", {"name": "steep", "config": {"gamma_max": 6.0}})
    assert built.endpoints() == (-9.0, 6.0)
    form = registry.serialise("noise_schedules", built)
    assert form == {"name": "steep", "config": {"gamma_max": 6.0}, "package": "vdm-hub-steep", "version": "1.2"}
    again = registry.build("noise_schedules", json.loads(json.dumps(form)))
    t = torch.linspace(0, 1, 9)
    assert type(again) is type(built) and torch.equal(again(t), built(t))
    assert registry.serialise("noise_schedules", registry.build("noise_schedules", "steep"))["config"] == {}  # type: ignore[index]


def test_what_is_installed_and_removed_meanwhile_is_noticed(install: Install, tmp_path: Path) -> None:
    for version in ("1.2", "1.3"):
        assert "steep" not in {found.name for found in registry.registrations("noise_schedules")}
        install("another-package", "steep", version=version)
        assert registry.lookup("noise_schedules", "steep").version == version
        shutil.rmtree(next(tmp_path.glob("another*.dist-info")))


@pytest.mark.parametrize("spelling", ["vdm-hub-steep", "vdm_hub_steep", "VDM.Hub--Steep"])
def test_package_names_are_compared_as_pip_compares_them(install: Install, spelling: str) -> None:
    install("vdm-hub-steep", "steep")
    assert registry.lookup("noise_schedules", "steep", spelling).package == "vdm-hub-steep"


def test_a_missing_plugin_is_told_with_the_pip_line_what_is_installed_and_the_nearest_name(install: Install) -> None:
    install("vdm-hub-steep", "steep")
    form = {"name": "stepe", "package": "vdm-hub-other", "version": "3"}
    text = paragraph(MissingPluginError, lambda: registry.build("noise_schedules", form))
    for part in ("'stepe'", "'vdm-hub-other'", "unverified", "pip install vdm-hub-other", "vdm-hub-steep", "'steep'"):
        assert part in text
    assert "http" not in text and "[" not in text
    assert issubclass(MissingPluginError, ImportError)


def test_a_package_that_is_installed_but_brings_another_name_does_not_decide(install: Install) -> None:
    install("vdm-hub-steep", "steep")
    form = {"name": "flat", "package": "vdm-hub-steep"}
    assert "does not bring it" in paragraph(MissingPluginError, lambda: registry.build("noise_schedules", form))


def test_a_name_of_another_kind_is_not_found(install: Install) -> None:
    install("vdm-hub-steep", "steep", kind="parameterizations")
    paragraph(ConfigurationError, lambda: registry.build("noise_schedules", "steep"))


def test_two_packages_with_one_name_are_both_named_unless_the_package_decides(install: Install) -> None:
    install("steep-one", "steep")
    install("steep-two", "steep")
    text = paragraph(ConfigurationError, lambda: registry.build("noise_schedules", "steep"))
    assert "'steep-one'" in text and "'steep-two'" in text and '"package"' in text
    built = registry.build("noise_schedules", {"name": "steep", "package": "steep-two"})
    assert type(built).__module__ == "plugin_of_steep_two"


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_a_built_in_cannot_be_taken(install: Install, kind: str) -> None:
    for i, name in enumerate(registry.BUILT_INS[kind]):
        before = registry.lookup(kind, name)
        install(f"taker-{i}", name, kind=kind)
        for package in (None, "vdm-hub", "vdm_hub"):
            assert registry.lookup(kind, name, package) == before
        with pytest.raises(ConfigurationError, match="built-in"):
            registry.lookup(kind, name, f"taker-{i}")


def test_a_plugin_that_fails_at_import_is_named_with_its_error(install: Install) -> None:
    install("broken-plugin", "broken", target="no_such_module_anywhere:Thing")
    text = paragraph(MissingPluginError, lambda: registry.build("noise_schedules", "broken"))
    assert "'broken-plugin'" in text and "no_such_module_anywhere" in text and "reinstall" in text


def test_a_class_that_nobody_registered_cannot_be_serialised() -> None:
    class Private:
        def to_config(self) -> dict[str, Any]:
            return {}

    text = paragraph(ConfigurationError, lambda: registry.serialise("decoders", Private()))
    assert "Private" in text and "entry point" in text and "factorised" in text


def test_a_config_that_is_not_json_is_refused(install: Install) -> None:
    install("vdm-hub-steep", "steep")
    built = registry.build("noise_schedules", "steep")
    for value in (float("nan"), object()):
        built.gamma_max = value
        assert "steep" in paragraph(ConfigurationError, lambda: registry.serialise("noise_schedules", built))


LISTING = """
import json, sys
from vdm_hub import registry
before = set(sys.modules)
names = {kind: [r.name for r in registry.registrations(kind)] for kind in registry.BUILT_INS}
registry.lookup("noise_schedules", "steep")
imported = set(sys.modules) - before
print("ANSWER" + json.dumps([names, sorted(imported)]))
"""


def test_listing_imports_nothing(install: Install, tmp_path: Path) -> None:
    install("vdm-hub-steep", "steep")
    (tmp_path / "plugin_of_vdm_hub_steep.py").write_text("raise SystemExit('a plugin was imported by a listing')\n")
    repository = Path(__file__).resolve().parents[1]
    process = subprocess.run(
        [*fork_server.NEW, "-c", f"import sys; sys.path[:0] = {[str(tmp_path), str(repository)]!r}\n{LISTING}"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    names, imported = json.loads(process.stdout.split("ANSWER")[1])
    assert "steep" in names["noise_schedules"] and names.keys() == registry.BUILT_INS.keys()
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert not foreign
