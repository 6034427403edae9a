"""The schedule keeps every law that vdm_hub relies on."""

from vdm_hub import Check, parametrize_with_checks
from vdm_hub_template import BowedSchedule


@parametrize_with_checks([BowedSchedule(), BowedSchedule(bow=-0.9)])
def test_conformance(check: Check) -> None:
    """One test for each law."""
    check()
