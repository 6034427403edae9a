"""The registry and ``vdm-hub plugins`` on packages that pip built and installed, sound and unsound ones."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributions import write_metadata
from naming import naming, paragraph
from testing.packages import pip_install, project
from vdm_hub import VDMScheduler, registry
from vdm_hub.commands import main
from vdm_hub.errors import ConfigurationError, MissingPluginError, VDMHubError
from vdm_hub.registry import OlderPluginWarning
from vdm_hub.version import __version__

STEEP = '''
from typing import Any
from vdm_hub.diffusion.noise_schedules import LinearSchedule


class Steep(LinearSchedule):
    """gamma from -9."""

    def __init__(self, gamma_max: float = 7.0) -> None:
        super().__init__(-9.0, gamma_max)

    def to_config(self) -> dict[str, Any]:
        return {"gamma_max": self.gamma_max}
'''
WRONG = (
    STEEP
    + '''

class Forgetful(Steep):
    """Breaks the law json_config."""

    def to_config(self):
        return {"gamma_max": 6.0}


class NotJSON(Steep):
    def to_config(self):
        return {"gamma_max": {7.0}}


class NotADict(Steep):
    def to_config(self):
        return ["gamma_max"]


class Raising(Steep):
    def __init__(self):
        raise KeyError("a table that is not there")


class Leaving(Steep):
    def __init__(self):
        raise SystemExit("no licence")


class NoSchedule:
    pass


def function():
    pass


from vdm_hub.diffusion.parameterizations import Epsilon
'''
)
PROJECTS: list[tuple[str, str, dict[str, dict[str, str]], str]] = [
    ("vdm-hub-good", STEEP, {"noise_schedules": {"steep": "Steep", "good_only": "Steep"}}, "1.2"),
    ("vdm-hub-twin", STEEP, {"noise_schedules": {"steep": "Steep", "linear": "Steep"}}, "1.2"),
    ("vdm-hub-fails", "raise RuntimeError('the driver\\nis too old')", {"noise_schedules": {"failing": "Steep"}}, "3"),
    (
        "vdm-hub-wrong",
        WRONG,
        {
            "noise_schedules": {
                "forgetful": "Forgetful",
                "not_json": "NotJSON",
                "not_a_dict": "NotADict",
                "raising": "Raising",
                "leaving": "Leaving",
                "no_schedule": "NoSchedule",
                "function": "function",
                "missing": "Missing",
                "another_kind": "Epsilon",
            },
            "decoders": {"no_decoder": "Steep"},
        },
        "0.1",
    ),
]
FAILING = {"failing", "forgetful", "not_json", "not_a_dict", "raising", "no_schedule", "function", "missing"}
FAILING |= {"another_kind", "no_decoder", "leaving"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("installed")
    sources = [project(root / name, name, source, points, version) for name, source, points, version in PROJECTS]
    modules = [name.replace("-", "_") for name, *_ in PROJECTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pip_install(root / "site", *sources))
        yield root / "site"
    for module in modules:
        sys.modules.pop(module, None)


pytestmark = pytest.mark.usefixtures("site")


def test_a_name_that_no_config_can_hold_is_shown_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip's build refuses such names; whoever writes the metadata by other means meets the same words."""
    write_metadata(tmp_path, "odd", "1", "[vdm_hub.decoders]\n../odd = os:system\n")
    (tmp_path / "nameless.dist-info").mkdir()
    (tmp_path / "nameless.dist-info" / "entry_points.txt").write_text("[vdm_hub.decoders]\nnameless = os:system\n")
    monkeypatch.syspath_prepend(tmp_path)
    found, _ = rows(capsys)
    assert found["../odd", "odd"]["status"] == "unusable: no valid name"
    assert found["nameless", "unknown"]["version"] == "unknown"


def build(name: str, package: str | None = None, **form: Any) -> Any:
    return registry.build("noise_schedules", {"name": name} | ({"package": package} if package else {}) | form)


def test_a_name_of_two_packages_is_refused_and_each_may_be_named() -> None:
    text = paragraph(ConfigurationError, lambda: build("steep"))
    assert "'vdm-hub-good'" in text and "'vdm-hub-twin'" in text
    for package in ("vdm-hub-good", "vdm-hub-twin"):
        assert type(build("steep", package)).__module__ == package.replace("-", "_")
    assert type(build("linear")).__module__ == "vdm_hub.diffusion.noise_schedules"
    form = registry.serialise("noise_schedules", build("steep", "vdm-hub-twin"))
    assert form == {"name": "steep", "config": {}, "package": "vdm-hub-twin", "version": "1.2"}  # and not as "linear"


def test_a_plugin_that_fails_at_import_shows_its_own_error_and_all_else_works() -> None:
    text = paragraph(MissingPluginError, lambda: build("failing"))
    for part in ("'failing'", "'vdm-hub-fails'", "RuntimeError", "the driver is too old", "reinstall"):
        assert part in text
    with pytest.raises(MissingPluginError) as caught:
        build("failing")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert build("good_only").endpoints() == (-9.0, 7.0) and build("linear").endpoints() == (-13.3, 5.0)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "no_schedule",
            ConfigurationError,
            "the class NoSchedule at vdm_hub_wrong:NoSchedule, which is not derived from",
        ),
        ("another_kind", ConfigurationError, "the class Epsilon at vdm_hub_wrong:Epsilon, which is not derived from"),
        ("function", ConfigurationError, "a function at vdm_hub_wrong:function"),
        ("missing", MissingPluginError, "AttributeError: module 'vdm_hub_wrong' has no attribute 'Missing'"),
        ("raising", ConfigurationError, "can't be built: 'a table that is not there'"),
    ],
)
def test_what_is_no_schedule_is_refused(name: str, error: type[VDMHubError], words: str) -> None:
    text = paragraph(error, lambda: build(name))
    assert words in text and repr(name) in text
    if words.endswith("derived from"):
        assert "vdm_hub.diffusion.noise_schedules.NoiseSchedule" in text


@pytest.mark.parametrize(("name", "words"), [("not_json", "not JSON"), ("not_a_dict", "must give a dict")])
def test_a_config_that_is_not_json_is_refused_when_it_is_saved(name: str, words: str) -> None:
    text = paragraph(ConfigurationError, lambda: registry.serialise("noise_schedules", build(name)))
    assert words in text and repr(name) in text


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"config": {"gamma_mx": 6.0}}, "did you mean 'gamma_max'"),
        ({"confg": {}}, "did you mean 'config'"),
        ({"version": 3}, "has the version 3: give a string"),
        *(({"config": wrong}, f"is {wrong!r}: give an object") for wrong in ([], 0, "", False, 3, [1])),
    ],
)
def test_unknown_fields_and_arguments_of_a_plugin_are_refused(form: dict[str, Any], words: str) -> None:
    assert words in paragraph(ConfigurationError, lambda: build("good_only", "vdm-hub-good", **form))


@pytest.mark.parametrize(
    "name", ["../steep", "/etc/passwd", "a/b", "steep\n", "c:\\steep", "", " ", "steep;rm", "a:b"]
)
def test_names_with_path_characters_are_refused_whatever_the_package(name: str) -> None:
    for package in (None, "vdm-hub-good", "vdm-hub-unheard-of"):
        text = paragraph(ConfigurationError, lambda: build(name, package))  # noqa: B023 - called at once
        assert "no valid name" in text and "pip install" not in text


def test_a_missing_name_of_an_installed_package_says_which_version_is_there() -> None:
    text = paragraph(MissingPluginError, lambda: build("stepe", "vdm_hub_good"))
    assert "is installed in version 1.2, which does not bring it" in text and "did you mean 'steep'" in text


# ---- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["1.3", "1.2.1", "1.10", "2", "1.2.post1", "1.3rc1"])
def test_an_older_version_than_the_saved_one_is_a_warning(saved: str) -> None:
    form = {"name": "steep", "package": "vdm-hub-good", "version": saved}
    for load in (lambda: registry.build("noise_schedules", form), lambda: VDMScheduler(noise_schedule=form)):
        with pytest.warns(OlderPluginWarning, match=naming("vdm-hub-good", saved, "1.2")):
            load()


@pytest.mark.parametrize("saved", ["1.2", "1.2.0", "1.1.9", "0.13", "1.2rc1", "1.2.dev3", "unknown", "9" * 5000])
def test_any_other_version_is_none(saved: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OlderPluginWarning)
        build("steep", "vdm-hub-good", version=saved)


# ---- what may be loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["vdm-hub-good", "VDM_Hub.Good, vdm-hub-unheard-of", " vdm-hub-good ,"])
def test_the_variable_limits_what_may_be_loaded(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDM_HUB_PLUGINS", value)
    assert type(build("steep")).__module__ == "vdm_hub_good"  # the only one left, so it needs no package
    assert build("linear").endpoints() == (-13.3, 5.0)
    for call in (lambda: build("steep", "vdm-hub-twin"), lambda: build("forgetful")):
        text = paragraph(ConfigurationError, call)
        assert f"VDM_HUB_PLUGINS={value!r} does not allow" in text and "'vdm-hub-" in text


def test_an_empty_variable_allows_no_plugin_and_imports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDM_HUB_PLUGINS", "")
    for module in ("vdm_hub_good", "vdm_hub_twin"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for registration in registry.registrations("noise_schedules"):
        if registration.package != "vdm-hub":
            paragraph(ConfigurationError, registration.load)
    assert "vdm_hub_good" not in sys.modules and "vdm_hub_twin" not in sys.modules
    assert isinstance(VDMScheduler().process, torch.nn.Module)


def test_a_variable_that_holds_no_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDM_HUB_PLUGINS", "vdm-hub-good;rm")
    assert "no name of a distribution" in paragraph(ConfigurationError, lambda: build("steep", "vdm-hub-good"))
    build("linear")


# ---- vdm-hub plugins ------------------------------------------------------------------------------------------------

COLUMNS = ["kind", "name", "package", "version", "defined", "status"]


def rows(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[dict[tuple[str, str], Any], str]:
    """What ``vdm-hub plugins --json`` lists, by name and package, and what it says on standard error."""
    capsys.readouterr()
    assert main(["plugins", "--json", *words]) == status
    shown = capsys.readouterr()
    return {(row["name"], row["package"]): row for row in json.loads(shown.out)}, shown.err


def test_the_list_names_everything_and_imports_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, *_ in PROJECTS:
        monkeypatch.delitem(sys.modules, name.replace("-", "_"), raising=False)
    found, said = rows(capsys)
    assert said == "" and not [module for module in sys.modules if module in ("vdm_hub_good", "vdm_hub_wrong")]
    assert found["steep", "vdm-hub-good"] == {
        "kind": "noise_schedules",
        "name": "steep",
        "package": "vdm-hub-good",
        "version": "1.2",
        "defined": "vdm_hub_good:Steep",
        "status": "installed; ambiguous without its package: vdm-hub-twin too",
    }
    assert found["good_only", "vdm-hub-good"]["status"] == "installed"
    assert found["linear", "vdm-hub-twin"]["status"] == "unusable: the name of a built-in"
    for kind, targets in registry.BUILT_INS.items():
        for name, target in targets.items():
            values = (kind, name, "vdm-hub", __version__, target, "built-in")
            assert found[name, "vdm-hub"] == dict(zip(COLUMNS, values, strict=True))


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    listed, _ = rows(capsys)
    assert main(["plugins"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == COLUMNS
    assert [line.split()[:5] for line in lines] == [[row[key] for key in COLUMNS[:5]] for row in listed.values()]


def test_check_names_each_failure_and_checks_the_others_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found, said = rows(capsys, "--check", status=2)
    assert {name for (name, _), row in found.items() if row["status"] == "FAILED"} == FAILING
    assert f"{len(FAILING)} of {len(found)} fail" in said and said.count("\n") == 1
    errors = " ".join(row.get("error", "") for row in found.values())
    for words in ("RuntimeError: the driver is too old", "breaks the law 'json_config'", "not derived from"):
        assert words in errors
    assert found["good_only", "vdm-hub-good"]["status"] == "passes"
    assert found["steep", "vdm-hub-twin"]["status"] == "passes; ambiguous without its package: vdm-hub-good too"
    assert all(row["status"] == "passes" for (_, package), row in found.items() if package == "vdm-hub")


@pytest.mark.slow
def test_check_leaves_alone_what_is_not_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VDM_HUB_PLUGINS", "vdm-hub-good")
    monkeypatch.delitem(sys.modules, "vdm_hub_wrong", raising=False)
    found, said = rows(capsys, "--check")
    assert said == "" and "vdm_hub_wrong" not in sys.modules
    assert found["forgetful", "vdm-hub-wrong"]["status"] == "not allowed by VDM_HUB_PLUGINS"
    assert found["steep", "vdm-hub-good"]["status"] == "passes"
    monkeypatch.setenv("VDM_HUB_PLUGINS", "a/b")
    assert main(["plugins"]) == 2
    assert "no name of a distribution" in capsys.readouterr().err
