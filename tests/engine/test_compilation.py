"""The first compilation is said, once, and those of other packages are not."""

import logging
from types import SimpleNamespace

import pytest

from dyadlm.compilation import announced

event = pytest.importorskip("numba.core.event")


def test_the_first_compilation_of_this_package_is_said_once(caplog):
    announced.__wrapped__()
    with caplog.at_level(logging.INFO, "dyadlm.compilation"):
        told = []
        for module in ("someone.else", "dyadlm.engine.numba_step", "dyadlm.engine.numba_step"):
            function = SimpleNamespace(__module__=module)
            event.start_event("numba:compile", {"dispatcher": SimpleNamespace(py_func=function)})
            told.append(sum("Compiling" in record.message for record in caplog.records))
    assert told[0] == 0
    assert told[1] == told[2] > 0
