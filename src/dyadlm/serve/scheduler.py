"""One thread for each model, which reads and writes for all its requests at the same time (continuous batching).

A request is a generator that yields what it wants of its row, one thing at a time: `Read` a text, `Step` on by one
token, or `Do` something else with the row. All rows that step do so at once:

    request 1   Read(prompt)....... Step Step Step Step
    request 2             Step Step Step Step
    request 3      Read(a long text).................................. Step
    thread     R1   R3 R1  S2 R3 S2 R3 S1,2 R3 S1,2 R3 S1 R3 R3 R3 ...  S3

Long texts are read in pieces, which get at most half of the time while others step. Of those that read, the one with
the least left and the oldest take turns, so that a short text need not wait for a long one, nor a long one for ever.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from dyadlm.errors import RunFailed, UserError
from dyadlm.generate.reader import before_each, nats_of
from dyadlm.serve.errors import ApiError
from dyadlm.serve.rows import LONG, Reading, Row, Rows

# Tokens of a piece of a long text.
PIECE = 512
# A request whose client has so many items to fetch waits for it.
MOST_WAITING = 4096

log = logging.getLogger("dyadlm.serve")


@dataclass(slots=True, eq=False)
class Read:
    """Read ids int64 (T,), T > 0; the generator receives a `Reading`, None where nothing of it is wanted.

    nats: the surprise at each token is wanted. logits: those before each token, too; ids should be few then.
    """

    ids: np.ndarray
    nats: bool = False
    logits: bool = False
    at: int = 0
    parts: list[Reading] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.ids) - self.at

    def result(self) -> Reading | None:
        """Of all parts."""
        if not (self.nats or self.logits):
            return None
        nats = np.concatenate([part.nats for part in self.parts])
        return Reading(nats, np.concatenate([part.logits for part in self.parts]) if self.logits else None)


@dataclass(slots=True, eq=False)
class Step:
    """Read one token; the row's logits are those after it. to_slots: whether slots take it in."""

    token: int
    to_slots: bool = True


@dataclass(slots=True, eq=False)
class Do:
    """Call this with the row, not seated, in the thread of the model. The generator receives what it returns."""

    work: Callable[[Row], Any]


Work: TypeAlias = Generator[Read | Step | Do, Any, None]


class Inbox:
    """What requests have made, for the one coroutine that waits for it. Several requests may share one.

    Items are pairs of the request's index and what it emitted; None in its place when it has ended.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Any]] = deque()
        self._some = asyncio.Event()

    def put(self, items: list[tuple[int, Any]]) -> None:
        """In the thread of the loop."""
        self._items.extend(items)
        self._some.set()

    async def take(self) -> list[tuple[int, Any]]:
        """All there is, at least one item."""
        await self._some.wait()
        items, self._items = list(self._items), deque()
        self._some.clear()
        return items


class Job:
    """A request while it is served. row: as it stands. error: with which it ended, if with one."""

    def __init__(
        self,
        make: "Callable[[Job], Work]",
        inbox: Inbox,
        row: Row | None = None,
        index: int = 0,
        seconds: float = 600.0,
    ):
        """make: its generator. row: where a copy of it starts; None: at the beginning. seconds: its deadline."""
        self.inbox, self.index = inbox, index
        self.deadline = time.monotonic() + seconds
        self.started = time.monotonic()
        self.error: Exception | None = None
        self.row: Row = row  # type: ignore[assignment]  # the scheduler gives it one
        self.rows: Rows | None = None
        self.keep_row = False  # whether the row is used on after the request
        self._cancelled = False
        self._make = make
        self._fresh: list[tuple[int, Any]] = []
        # Each is written by one thread alone: that of the model, that of the loop.
        self._sent = self._taken = 0

    def emit(self, item: Any) -> None:
        """Hand an item to whoever waits for the request."""
        self._fresh.append((self.index, item))

    def cancel(self) -> None:
        """Nobody waits for it any more. Safe in any thread."""
        self._cancelled = True

    def copy_row(self, row: Row) -> Row:
        """For `Do`: the row as it stands."""
        assert self.rows is not None
        return self.rows.copy(row)

    def stand_at(self, row: Row) -> None:
        """For `Do`: go on from another row."""
        self.row = row

    @property
    def unsent(self) -> int:
        """Items in the inbox or on the way to it."""
        return self._sent - self._taken

    def took(self, items: int) -> None:
        """So many items have reached the client. In the thread of the loop."""
        self._taken += items


class Scheduler:
    """The thread of one model. Requests are `submit`ted in the thread of the event loop."""

    def __init__(self, rows: Rows, streams: int, queue: int, name: str = "model"):
        self.rows = rows
        self._most_live, self._most_waiting = streams, queue
        self._waiting: deque[Job] = deque()
        self._live: list[_Live] = []
        self._changed = threading.Condition()
        self._closing = self._closed = False
        self._spent_reading = self._spent_stepping = 0.0
        self._oldest_next = False
        self._outgoing: dict[Inbox, list[tuple[int, Any]]] = {}
        self.tokens_read = self.tokens_written = self.steps = 0
        self._seconds_of_job = 1.0  # a moving average
        self._thread = threading.Thread(target=self._run, name=f"dyadlm {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def live(self) -> int:
        """Requests that are read or written now."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, *jobs: Job) -> None:
        """Take requests in, all or none. Raises `ApiError` where the queue is full, or the server is about to end."""
        with self._changed:
            if self._closing:
                raise ApiError(503, "The server is shutting down; try again soon.", code="shutting_down", retry_after=5)
            most = self._most_waiting + max(0, self._most_live - len(self._live))
            if len(self._waiting) + len(jobs) > most:  # those whose clients have left take no room
                self._waiting = deque(job for job in self._waiting if not job._cancelled)
            if len(self._waiting) + len(jobs) > most:
                waves = 1 + len(self._waiting) / self._most_live
                raise ApiError(
                    429,
                    "The server has more requests than it can take; try again in a moment.",
                    code="queue_full",
                    retry_after=min(60.0, waves * self._seconds_of_job),
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self, grace: float) -> None:
        """Let what runs end, within some seconds, and end the thread; what still waits or runs then is given up."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        end = time.monotonic() + grace
        while (self._live or self._waiting) and time.monotonic() < end:
            time.sleep(0.02)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._live or self._waiting or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                admitted: list[Job] = []
                while self._waiting and len(self._live) + len(admitted) < self._most_live:
                    admitted.append(self._waiting.popleft())
            for job in admitted:
                self._admit(job)
            try:
                idle = not self._turn()
            except Exception as error:  # of the model itself, such as no memory: no request may wait for ever
                log.exception("A step failed.")
                for live in list(self._live):
                    self._end(live, error)
                idle = False
            self._deliver()
            if idle:
                time.sleep(0.005)  # all wait for their clients
        stopped = ApiError(503, "The server was stopped before the answer was complete.", code="shutting_down")
        for live in list(self._live):
            self._end(live, stopped)
        for job in self._waiting:
            job.error = stopped
            self._outgoing.setdefault(job.inbox, []).append((job.index, None))
        self._waiting.clear()
        self._deliver()

    def _turn(self) -> bool:
        """Read a piece, or step; whether there was anything to do."""
        now = time.monotonic()
        reading: list[_Live] = []
        stepping: list[_Live] = []
        for live in list(self._live):
            job = live.job
            if job._cancelled:
                self._end(live, None)
            elif now > job.deadline:
                message = "The request took too long; ask for fewer tokens, or raise the server's --deadline."
                self._end(live, ApiError(503, message, code="deadline_exceeded"))
            elif job.unsent < MOST_WAITING:
                (reading if live.is_long else stepping).append(live)
        if not (reading and stepping):
            self._spent_reading = self._spent_stepping = 0.0
        if reading and (not stepping or self._spent_reading <= self._spent_stepping):
            self._read_piece(reading)
            self._spent_reading += time.monotonic() - now
        elif stepping:
            self._step(stepping)
            self._spent_stepping += time.monotonic() - now
        return bool(reading or stepping)

    def _read_piece(self, reading: "list[_Live]") -> None:
        self._oldest_next = not self._oldest_next
        live = reading[0] if self._oldest_next else min(reading, key=_Live.left)
        job, command = live.job, live.command
        if isinstance(command, Do):
            self.rows.release(job.row, keep=True)
            self._go_on(live, lambda: command.work(job.row))
            return
        assert isinstance(command, Read)
        ids = command.ids[command.at : command.at + PIECE]
        try:
            command.parts.append(self.rows.read(job.row, ids, command.logits))
        except (UserError, RunFailed) as error:
            self._end(live, error)
            return
        command.at += len(ids)
        self.tokens_read += len(ids)
        if not command.left:
            self._go_on(live, command.result)

    def _step(self, stepping: "list[_Live]") -> None:
        tokens, before = [], []
        for live in stepping:
            command = live.command
            tokens.append(command.token if isinstance(command, Step) else int(command.ids[command.at]))  # type: ignore[union-attr]
            before.append(live.job.row.logits)
            if isinstance(command, Step) and not command.to_slots:
                self.rows.skip_slot_write(live.job.row)
        self.rows.step([live.job.row for live in stepping], tokens)
        self.steps += 1
        for live, token, logits in zip(stepping, tokens, before, strict=True):
            command = live.command
            if isinstance(command, Step):
                self.tokens_written += 1
                self._go_on(live, None)
                continue
            assert isinstance(command, Read)
            self.tokens_read += 1
            command.at += 1
            if command.nats or command.logits:
                after = live.job.row.logits
                assert after is not None
                nats = nats_of(logits, after[None], np.array([token]))
                command.parts.append(Reading(nats, before_each(logits, after[None]) if command.logits else None))
            if not command.left:
                self._go_on(live, command.result)

    def _admit(self, job: Job) -> None:
        if job._cancelled:
            self._outgoing.setdefault(job.inbox, []).append((job.index, None))
            return
        try:
            job.rows = self.rows
            job.row = self.rows.start() if job.row is None else self.rows.copy(job.row)
            live = _Live(job, job._make(job))
        except Exception as error:  # such as no memory: the thread goes on with the others
            job.error = error
            job.emit(None)
            self._collect(job)
            return
        self._live.append(live)
        self._go_on(live, None)

    def _go_on(self, live: "_Live", value: Callable[[], Any] | None) -> None:
        """Let the request have what it wanted, and say what it wants next."""
        try:
            live.command = live.work.send(None if value is None else value())
            while isinstance(live.command, Read) and not live.command.left:
                live.command = live.work.send(Reading(np.empty(0, np.float32), None))
        except StopIteration:
            self._end(live, None)
        except Exception as error:
            self._end(live, error)
        else:
            self._collect(live.job)

    def _end(self, live: "_Live", error: Exception | None) -> None:
        job = live.job
        self._live.remove(live)
        try:
            live.work.close()
            self.rows.release(job.row, keep=job.keep_row and error is None)
        except Exception as failed:  # the request has to end all the same, and the others to go on
            error = error or failed
        job.error = error
        job.emit(None)
        self._collect(job)
        self._seconds_of_job += 0.1 * (time.monotonic() - job.started - self._seconds_of_job)

    def _collect(self, job: Job) -> None:
        if job._fresh:
            job._sent += len(job._fresh)
            self._outgoing.setdefault(job.inbox, []).extend(job._fresh)
            job._fresh = []

    def _deliver(self) -> None:
        """Hand what was made to the event loops; once a turn, since waking a loop costs more than a token."""
        outgoing, self._outgoing = self._outgoing, {}
        for loop in {inbox.loop for inbox in outgoing}:
            own = [(inbox, items) for inbox, items in outgoing.items() if inbox.loop is loop]
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(_put_all, own)


def _put_all(found: list[tuple[Inbox, list[tuple[int, Any]]]]) -> None:
    for inbox, items in found:
        inbox.put(items)


@dataclass(slots=True, eq=False)
class _Live:
    """A request that runs. command: what it wants of its row."""

    job: Job
    work: Work
    command: Read | Step | Do = field(default_factory=lambda: Step(0))

    @property
    def is_long(self) -> bool:
        """Whether it is read in pieces by itself; else it steps with the others."""
        return isinstance(self.command, Do) or (isinstance(self.command, Read) and self.command.left >= LONG)

    def left(self) -> int:
        """Tokens to read."""
        return self.command.left if isinstance(self.command, Read) else 0
