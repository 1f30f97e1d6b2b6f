"""Every control of every probe shows what is known of it."""

import pytest

from dyadlm.diagnose import PROBES, Budget
from dyadlm.diagnose.self_test import check

pytestmark = pytest.mark.slow

CONTROLS = [(probe, number) for probe, kind in PROBES.items() for number in range(len(kind().controls()))]


@pytest.mark.parametrize(("probe", "number"), CONTROLS)
def test_a_control_shows_what_is_known_of_it(probe, number):
    asked = PROBES[probe]()
    checks = check(asked, asked.controls()[number], Budget())
    assert checks
    for one in checks:
        assert one.passed, one


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_has_a_control_that_shows_and_one_that_lacks(probe):
    assert {control.shows for control in PROBES[probe]().controls()} == {True, False}
