"""The conformance kit: what is sound passes, and each of the deliberately broken is caught by exactly one law."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import registered
from naming import naming
from testing import broken_plugins
from testing.packages import ROOT, pip_install, project
from vdm_hub import registry
from vdm_hub.errors import ConfigurationError
from vdm_hub.testing import (
    LawViolation,
    check_command,
    check_conditioning,
    check_decoder,
    check_forward_process,
    check_likelihood_method,
    check_network,
    check_parameterization,
    check_schedule,
    laws_of,
    parametrize_with_checks,
)
from vdm_hub.testing.checks import LAWS
from vdm_hub.testing.installed import check_registered

PACKAGE = "vdm-hub-broken"
BAR = "\\|"  # as a table of markdown has it
CASES = [(kind, law) for kind, laws in broken_plugins.BROKEN.items() for law in laws]
WITHOUT_NUMBERS = (  # what is wrong is a name, or that something is missing
    "built_without_arguments",
    "extra_terms",
    "frozen",
    "gradients_reach_the_network",
    "helps",
    "json_protocol",
    "parameters_are_trained",
    "registered",
    "says_what_it_does",
    "suits_a_schedule",
)
_CHECKS: tuple[Any, ...] = (check_schedule, check_parameterization, check_conditioning, check_forward_process)
_CHECKS += (check_network, check_likelihood_method, check_decoder, check_command)
CHECKS = dict(zip(LAWS, _CHECKS, strict=True))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module of the broken plugins, from the package that pip installed."""
    root = tmp_path_factory.mktemp("broken")
    names = {kind: {name: name for name in broken_plugins.declared(kind)} for kind in broken_plugins.BROKEN}
    source = Path(broken_plugins.__file__).read_text()
    site = pip_install(root / "site", project(root / PACKAGE, PACKAGE, source, names))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield importlib.import_module("vdm_hub_broken")
    sys.modules.pop("vdm_hub_broken", None)


def broken_laws(instance: object) -> dict[str, str]:
    found = {}
    for name, law in laws_of(instance).by_name.items():
        try:
            law.check(instance)
        except LawViolation as violation:
            found[name] = str(violation)
    return found


def test_there_is_a_broken_plugin_for_every_law() -> None:
    assert {kind: set(laws.by_name) for kind, laws in LAWS.items()} == {
        kind: set(laws) for kind, laws in broken_plugins.BROKEN.items()
    }


@pytest.mark.parametrize(("kind", "law"), CASES)
def test_each_is_caught_by_exactly_that_law(broken: ModuleType, kind: str, law: str) -> None:
    instance = broken.BROKEN[kind][law]()
    found = broken_laws(instance)
    assert set(found) == {law}, found
    assert found[law].startswith(f"{type(instance).__name__} breaks the law {law!r} (")
    assert re.search(r"\d", found[law].partition("): ")[2]) or law in WITHOUT_NUMBERS


@pytest.mark.parametrize("kind", LAWS)
def test_a_check_says_which_law_is_broken_unless_that_is_expected(broken: ModuleType, kind: str) -> None:
    law = next(iter(LAWS[kind].by_name))
    instance = broken.BROKEN[kind][law]()
    with pytest.raises(LawViolation, match=re.escape(broken_laws(instance)[law])):
        CHECKS[kind](instance)
    CHECKS[kind](instance, expected_failures={law: "it is broken"})


@pytest.mark.parametrize("name", [cls.__name__ for cls in broken_plugins.OTHERWISE_BROKEN])
def test_so_are_other_ways_to_break_one(broken: ModuleType, name: str) -> None:
    cls = getattr(broken, name)
    assert set(broken_laws(cls())) == broken.OTHERWISE_BROKEN[cls]


@pytest.mark.parametrize("kind", LAWS)
def test_what_they_are_derived_from_keeps_all_laws(broken: ModuleType, kind: str) -> None:
    assert broken_laws(broken.SOUND[kind]()) == {}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in LAWS for name in registry.BUILT_INS[kind]], ids=lambda value: value
)
def test_every_built_in_keeps_all_laws(kind: str, name: str) -> None:
    check_registered(registry.lookup(kind, name))


@pytest.mark.parametrize(("schedule", "target"), registered.crossed("noise_schedules", "parameterizations"))
def test_every_gaussian_process_keeps_all_laws(schedule: str, target: str) -> None:
    check_forward_process(registered.process(registered.schedule(schedule), target))


def test_an_expected_failure_that_passes_is_a_failure() -> None:
    schedule = registered.schedule("linear")
    with pytest.raises(LawViolation, match=naming("'inverse'")):
        check_schedule(schedule, expected_failures={"inverse": "it had none"})


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_an_expected_failure_needs_a_reason(reason: str) -> None:
    schedule = registered.schedule("linear")
    for call in (check_schedule, lambda one, expected: parametrize_with_checks([one], expected)):
        with pytest.raises(ConfigurationError, match=naming("'inverse'")):
            call(schedule, {"inverse": reason})


def test_an_expected_failure_of_no_law_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=naming("'inverse'")):
        check_schedule(registered.schedule("linear"), {"invers": "a slip"})


@pytest.mark.parametrize("thing", [3, "linear", registered.schedule, None])
def test_what_has_no_laws_is_refused(thing: object) -> None:
    with pytest.raises(ConfigurationError, match=naming("NoiseSchedule")):
        parametrize_with_checks([thing])
    with pytest.raises(ConfigurationError, match=naming("NoiseSchedule")):
        check_schedule(thing)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no instance"):
        parametrize_with_checks([])


def test_the_laws_leave_the_random_state_and_the_instance_alone() -> None:
    schedule = registered.schedule("learned_monotone")
    before, state = schedule.state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    check_schedule(schedule)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in schedule.state_dict().items())
    assert schedule.training and all(p.grad is None for p in schedule.parameters())


CONFORMANCE = """
import torch
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.parameterizations import Epsilon
from vdm_hub.testing import parametrize_with_checks


class Backwards(LinearSchedule):
    def inverse(self, gamma):
        return 1 - super().inverse(gamma)


@parametrize_with_checks([LinearSchedule(), LinearSchedule(-9.0), Epsilon()])
def test_sound(check):
    check()


@parametrize_with_checks([Backwards()], expected_failures=EXPECTED)
def test_broken(check):
    check()
"""


@pytest.mark.parametrize(
    ("expected", "outcome"),
    [
        ({"inverse": "it runs backwards", "registered": "for this test alone"}, {"xfailed": 2, "failed": 0}),
        ({"inverse": "it runs backwards"}, {"xfailed": 1, "failed": 1}),
        ({"inverse": "a", "registered": "b", "finite": "c"}, {"xfailed": 2, "failed": 1}),
    ],
)
def test_parametrize_with_checks_in_pytest(
    expected: dict[str, str], outcome: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Count:
        def __init__(self) -> None:
            self.names: list[str] = []
            self.outcomes = {"passed": 0, "failed": 0, "xfailed": 0}

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call":
                self.names.append(report.nodeid)
                kind = "xfailed" if report.outcome == "skipped" and hasattr(report, "wasxfail") else report.outcome
                self.outcomes[kind] += 1

    path, count = tmp_path / f"test_backwards_{len(expected)}_{outcome['failed']}.py", Count()
    path.write_text(CONFORMANCE.replace("EXPECTED", repr(expected)))
    pytest.main(
        [str(path), "-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={tmp_path}"], plugins=[count]
    )
    capsys.readouterr()
    assert {kind: count.outcomes[kind] for kind in outcome} == outcome
    ids = {name.partition("[")[2].rstrip("]") for name in count.names}
    assert {"LinearSchedule0-finite", "LinearSchedule1-finite", "Epsilon-one_loss", "Backwards-inverse"} <= ids


def test_the_documentation_lists_every_law_with_what_it_says() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    laws = [law for one in LAWS.values() for law in one.by_name.values()]
    rows = [f"| `{law.name}` | {law.statement.replace('|', BAR)} |" for law in laws]
    assert sorted(line for line in text.splitlines() if line in rows) == sorted(rows)


WITHOUT_PYTEST = """
import subprocess
import sys
sys.modules["pytest"] = None
from vdm_hub.diffusion.parameterizations import Epsilon
from vdm_hub.testing import check_parameterization
check_parameterization(Epsilon())
"""


def test_the_kit_itself_needs_no_pytest() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTEST], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
