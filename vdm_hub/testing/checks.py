"""The doors of the conformance kit: one call per kind, and the laws as tests of pytest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from vdm_hub.diffusion.conditioning import Conditioning
from vdm_hub.diffusion.decoders import Decoder
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.diffusion.parameterizations import Parameterization
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.methods import LikelihoodMethod
from vdm_hub.testing import probability_laws  # noqa: F401  (the other half of PROCESS_LAWS)
from vdm_hub.testing.command_laws import COMMAND_LAWS
from vdm_hub.testing.conditioning_laws import CONDITIONING_LAWS
from vdm_hub.testing.decoder_laws import DECODER_LAWS
from vdm_hub.testing.laws import Law, Laws, LawViolation, check_reasons
from vdm_hub.testing.method_laws import METHOD_LAWS
from vdm_hub.testing.network_laws import NETWORK_LAWS
from vdm_hub.testing.parameterization_laws import PARAMETERIZATION_LAWS
from vdm_hub.testing.process_laws import PROCESS_LAWS
from vdm_hub.testing.schedule_laws import SCHEDULE_LAWS

_ALL = [SCHEDULE_LAWS, PARAMETERIZATION_LAWS, CONDITIONING_LAWS, PROCESS_LAWS]
_ALL += [NETWORK_LAWS, METHOD_LAWS, DECODER_LAWS, COMMAND_LAWS]
LAWS = {laws.kind: laws for laws in _ALL}
"""All laws, by the registry's kind."""


def check_schedule(schedule: NoiseSchedule, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a noise schedule under all its laws.

    Args:
        schedule: One that takes data of shape (B, 1, 8, 8), if it looks at data.
        expected_failures: Names of laws that it is known to break, each with the reason.

    Raises:
        LawViolation: It breaks other laws, or keeps one that it is said to break; the message holds a line for each.

    >>> from vdm_hub.diffusion.noise_schedules import CosineSchedule
    >>> check_schedule(CosineSchedule())
    """
    SCHEDULE_LAWS.check(schedule, expected_failures)


def check_parameterization(
    parameterization: Parameterization, expected_failures: Mapping[str, str] | None = None
) -> None:
    """Put a target under all its laws; see `check_schedule`.

    >>> from vdm_hub.diffusion.parameterizations import Velocity
    >>> check_parameterization(Velocity())
    """
    PARAMETERIZATION_LAWS.check(parameterization, expected_failures)


def check_conditioning(conditioning: Conditioning, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a conditioning under all its laws; see `check_schedule`.

    >>> from vdm_hub.diffusion.conditioning import AffineConditioning
    >>> check_conditioning(AffineConditioning())
    """
    CONDITIONING_LAWS.check(conditioning, expected_failures)


def check_forward_process(process: ForwardProcess, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a forward process under all its laws; see `check_schedule`.

    >>> from vdm_hub import VDMScheduler
    >>> check_forward_process(VDMScheduler(num_levels=17).process)
    """
    PROCESS_LAWS.check(process, expected_failures)


def check_network(network: ModelMixin, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a network under all its laws; see `check_schedule`.

    >>> from vdm_hub import UNetVDMModel
    >>> check_network(UNetVDMModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4))
    """
    NETWORK_LAWS.check(network, expected_failures)


def check_likelihood_method(method: LikelihoodMethod, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a likelihood method under all its laws, on a small model; see `check_schedule`.

    >>> from vdm_hub import VariationalBound
    >>> check_likelihood_method(VariationalBound(transitions=5))
    """
    METHOD_LAWS.check(method, expected_failures)


def check_decoder(decoder: Decoder, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a decoder under all its laws; see `check_schedule`.

    >>> from vdm_hub.diffusion.decoders import FactorisedDecoder
    >>> check_decoder(FactorisedDecoder())
    """
    DECODER_LAWS.check(decoder, expected_failures)


def check_command(command: Any, expected_failures: Mapping[str, str] | None = None) -> None:
    """Put a command of ``vdm-hub`` under all its laws; see `check_schedule`.

    >>> from vdm_hub import Command
    >>> class Greet(Command):
    ...     "Greet somebody."
    ...
    ...     def declare(self, parser):
    ...         parser.add_argument("name")
    ...
    ...     def run(self, arguments):
    ...         print(f"Hello, {arguments.name}!")
    >>> check_command(Greet(), {"registered": "an example in a docstring"})
    """
    COMMAND_LAWS.check(command, expected_failures)


def laws_of(instance: object) -> Laws:
    """The laws of an instance's kind.

    >>> from vdm_hub.diffusion.noise_schedules import LinearSchedule
    >>> list(laws_of(LinearSchedule()).by_name)[:3]
    ['shape_and_dtype', 'finite', 'strictly_increasing']
    """
    for laws in LAWS.values():
        if isinstance(instance, laws.base):
            return laws
    known = ", ".join(laws.base.__name__ for laws in LAWS.values())
    raise ConfigurationError(f"there are no laws for {instance!r:.200}: give an instance derived from one of {known}.")


@dataclass(frozen=True)
class Check:
    """One law and one instance; call it to put the instance under the law."""

    law: Law
    instance: object

    def __call__(self) -> None:
        """Raise a `LawViolation` where the instance breaks the law."""
        self.law.check(self.instance)

    def __str__(self) -> str:
        return f"{type(self.instance).__name__}-{self.law.name}"


def parametrize_with_checks(instances: Iterable[object], expected_failures: Mapping[str, str] | None = None) -> Any:
    """A decorator that runs a test once for each instance and each law of its kind, as its argument ``check``.

    Args:
        instances: Of any kinds that have laws.
        expected_failures: Laws that these instances break, each with the reason; one that passes all the same fails.

    Raises:
        ConfigurationError: There is no instance, one is of no kind, or an expected failure names no law or no reason.

    Example::

        @parametrize_with_checks([MySchedule()], expected_failures={"inverse": "not monotone, as in section 3"})
        def test_conformance(check):
            check()
    """
    import pytest  # only here: the kit itself does without

    instances = list(instances)
    if not instances:
        raise ConfigurationError("parametrize_with_checks got no instance, so that nothing would be tested.")
    known = {name: law for instance in instances for name, law in laws_of(instance).by_name.items()}
    expected = check_reasons(expected_failures or {}, known)
    parameters = []
    for number, instance in enumerate(instances):
        for law in laws_of(instance).by_name.values():
            check, reason = Check(law, instance), expected.get(law.name)
            marks = [pytest.mark.xfail(reason=reason, strict=True, raises=LawViolation)] if reason else []
            several = sum(type(other) is type(instance) for other in instances) > 1
            name = f"{type(instance).__name__}{number if several else ''}-{law.name}"
            parameters.append(pytest.param(check, id=name, marks=marks))
    return pytest.mark.parametrize("check", parameters)
