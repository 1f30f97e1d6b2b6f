"""Ending in good order: a signal or a reader that leaves stops a command between two tokens, and its state is saved."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import typer

from dyadlm.cli.shared import errors
from dyadlm.files import printable

Item = TypeVar("Item")
# A second signal of the same kind ends at once.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):
    """A signal has come. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


class Stops:
    """Remembers a signal until it is safe to stop. Signals that the caller ignores (`nohup`) stay ignored."""

    def __init__(self) -> None:
        self.received = 0
        self._waiting = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        if self._waiting:
            raise Stopped(number)

    def after_each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; stops after one, never while the next is made."""
        for item in items:
            yield item
            if self.received:
                raise Stopped(self.received)

    def while_waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items of a source that may have nothing for a long time; stops while it waits for one, or after one."""
        iterator = iter(items)
        while True:
            self._waiting = True
            try:
                if self.received:
                    raise Stopped(self.received)
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item


class Interrupts:
    """Ctrl-C as a request to stop what is being done and not the program; a second one raises `KeyboardInterrupt`."""

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def until_one(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items until Ctrl-C."""
        for item in items:
            yield item
            if self.received:
                return


@contextmanager
def ending_well(
    save: Callable[[], None] | None = None, place: Path | None = None, interrupt_code: int = 130
) -> Iterator[Stops]:
    """Run a command that writes to standard output. However it is stopped, `save` is called, and `place` is named.

    The exit code is 0 where the reader of the output has left (`| head`), `interrupt_code` after Ctrl-C, and 128 and
    the number after another signal.
    """
    stops, code, cause = Stops(), 0, ""
    with stops:
        try:
            yield stops
            sys.stdout.flush()
        except BrokenPipeError:
            cause = "The output is read no more"
            # What is still buffered would raise again when Python closes standard output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Stopped as stopped:
            interrupted = stopped.number == signal.SIGINT
            code = interrupt_code if interrupted else 128 + stopped.number
            cause = "Interrupted" if interrupted else f"Stopped by {signal.Signals(stopped.number).name}"
        except OSError:  # the disk is full, say
            if save is not None:
                save()
            raise
        if save is not None:
            save()
    if cause and place is not None:
        errors.print(f"{cause}; the state so far is in {printable(str(place))}.")
    if cause:
        raise typer.Exit(code)


@contextmanager
def saying_when_stopped(told: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what is done in the block, wherever it is; then what `told` returns is said.

    The exit code is 128 and the number of the signal.
    """
    received, previous = signal.SIGINT, {}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt  # the one error that gets out of a call of Ray

    if threading.current_thread() is threading.main_thread():
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not under nohup
        previous = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    except KeyboardInterrupt:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # all that is left is to end
        previous = {}
        errors.print(told())
        raise typer.Exit(128 + received) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def where_it_goes_on(output: Path | None) -> str:
    """What is said of work whose results are kept in `output` one by one, when it was stopped."""
    if output is None:
        return "Stopped; nothing is kept without --output."
    if not output.exists():
        return "Stopped; nothing was measured yet."
    return f"Stopped; what was measured is in {printable(str(output))}. The same command goes on from there."
