"""The conformance kit: laws that every noise schedule, target, conditioning and forward process must keep.

A plugin's test is three lines::

    @parametrize_with_checks([MySchedule()])
    def test_conformance(check):
        check()

`check_schedule` and its like put one instance under all laws of its kind, without pytest.
"""

from vdm_hub.testing.checks import (
    Check,
    check_conditioning,
    check_forward_process,
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
    "check_conditioning",
    "check_forward_process",
    "check_parameterization",
    "check_schedule",
    "laws_of",
    "parametrize_with_checks",
]
