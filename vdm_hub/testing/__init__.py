"""The conformance kit: laws that whatever is registered, of any kind, must keep.

A plugin's test is three lines::

    @parametrize_with_checks([MySchedule()])
    def test_conformance(check):
        check()

`check_schedule` and its like put one instance under all laws of its kind, without pytest.
"""

from vdm_hub.testing.checks import (
    Check,
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
from vdm_hub.testing.laws import Law, LawViolation

__all__ = [
    "Check",
    "Law",
    "LawViolation",
    "check_command",
    "check_conditioning",
    "check_decoder",
    "check_forward_process",
    "check_likelihood_method",
    "check_network",
    "check_parameterization",
    "check_schedule",
    "laws_of",
    "parametrize_with_checks",
]
