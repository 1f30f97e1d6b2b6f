"""Says once that numba compiles, since nobody who waits for the first token of a machine knows what it waits for."""

import logging
from functools import cache

log = logging.getLogger("dyadlm.compilation")


@cache
def announced() -> None:
    """From here on, the first function of this package that numba compiles, and does not have from before, is logged.

    Call it where numba is there. The event API of numba says when it compiles.
    """
    from numba.core import event

    class FirstCompilation(event.Listener):
        said = False

        def on_start(self, started: event.Event) -> None:
            if not self.said and started.data["dispatcher"].py_func.__module__.startswith("dyadlm."):
                self.said = True
                log.info("Compiling for this machine, once; later starts are faster.")

        def on_end(self, ended: event.Event) -> None:
            """Nothing is said of it."""

    event.register("numba:compile", FirstCompilation())  # type: ignore[no-untyped-call]
