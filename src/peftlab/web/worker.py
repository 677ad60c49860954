"""The one thread that owns the models: it lets requests join at a token boundary, and hands their pieces to the loop.

A request is a ticket: one job a choice. Its pieces arrive in `Ticket.events` on the event loop; whoever leaves the
ticket gives its rows back at the next boundary.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import PeftlabError
from ..runs.progress import say
from ..sampling.continuous import Batch, Row
from .reply import Piece, Reply


class Full(Exception):
    """So many rows wait already that no more may come."""


class Closed(Exception):
    """The server is going down."""


@dataclass(eq=False)
class Job:
    """A row, what becomes of its tokens, and the choice of its ticket that it is."""

    row: Row
    reply: Reply
    ticket: Ticket
    index: int


Event = tuple[int, Piece] | BaseException


@dataclass(eq=False)
class Ticket:
    """A request's rows in one batch. `events`: (choice, piece), or an exception that ends it. Times are monotonic."""

    batch: Batch
    jobs: list[Job] = field(default_factory=list)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    left: bool = False
    began: float | None = None
    first: float | None = None

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left = True


class Worker:
    """Runs on a thread of its own from `start` to `close`. `max_queue`: rows and calls that may wait."""

    def __init__(self, batches: Sequence[Batch], max_queue: int) -> None:
        self.batches, self.max_queue = batches, max_queue
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[Row, Job] = {}
        self._news = threading.Condition()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._calls)

    @property
    def capacity(self) -> int:
        """The most rows and calls that may run and wait at a time."""
        return self.max_queue + max(1, sum(batch.max_rows for batch in self.batches))

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End after the step at hand; what runs or waits is told Closed."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket's jobs; from the event loop. Raises Full or Closed."""
        self._loop = asyncio.get_running_loop()
        with self._news:
            self._admit(len(ticket.jobs))
            self._waiting += ticket.jobs
            self._news.notify()

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of `function`, run between two tokens. Raises Full or Closed, or what it raises."""
        future: Future[Any] = Future()
        with self._news:
            self._admit(1)
            self._calls.append((function, future))
            self._news.notify()
        return await asyncio.wrap_future(future)

    def _admit(self, more: int) -> None:
        if self._closed:
            raise Closed
        if self.running + self.waiting + more > self.capacity:
            raise Full

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self.waiting or self._running)
                if self._closed:
                    break
                calls, waiting = list(self._calls), [job for job in self._waiting if not job.ticket.left]
                self._calls.clear()
                self._waiting = deque(waiting)
            for function, future in calls:
                self._answer(function, future)
            for batch in self.batches:
                self._round(batch, [job for job in waiting if job.ticket.batch is batch])
        self._end(Closed())

    def _answer(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            if not isinstance(error, PeftlabError):
                say(traceback.format_exc())
            future.set_exception(error)

    def _round(self, batch: Batch, waiting: Sequence[Job]) -> None:
        """Let rows join, and go on by a token. A failure ends the rows of this batch, and nothing else."""
        try:
            joining = waiting[: batch.room([job.row for job in waiting])]
            if joining:
                self._join(batch, joining)
            if batch.rows:
                self._step(batch)
        except Exception as error:
            say(traceback.format_exc())
            jobs = [job for job in [*self._running.values(), *waiting] if job.ticket.batch is batch]
            self._forget(jobs)
            batch.clear()
            self._tell([(job.ticket, error) for job in jobs])

    def _join(self, batch: Batch, joining: Sequence[Job]) -> None:
        now = time.monotonic()
        with self._news:
            for job in joining:
                self._waiting.remove(job)
                self._running[job.row] = job
                job.ticket.began = job.ticket.began or now
        batch.join([job.row for job in joining])

    def _step(self, batch: Batch) -> None:
        news: list[tuple[Ticket, Event]] = []
        gone: set[Row] = set()
        for row, chosen in zip(batch.rows, batch.choose(), strict=True):
            job = self._running[row]
            piece = None if job.ticket.left else job.reply.take(chosen)
            if piece:
                job.ticket.first = job.ticket.first or time.monotonic()
                news.append((job.ticket, (job.index, piece)))
            if job.ticket.left or job.reply.finish:
                gone.add(row)
        self._tell(news)
        batch.leave(gone)
        for row in gone:
            del self._running[row]
        batch.advance()

    def _forget(self, jobs: Sequence[Job]) -> None:
        with self._news:
            for job in jobs:
                self._running.pop(job.row, None)
                if job in self._waiting:
                    self._waiting.remove(job)

    def _end(self, error: BaseException) -> None:
        with self._news:
            jobs, calls = [*self._running.values(), *self._waiting], list(self._calls)
            self._running.clear()
            self._waiting.clear()
            self._calls.clear()
        self._tell([(job.ticket, error) for job in jobs])
        for _, future in calls:
            if future.set_running_or_notify_cancel():  # not of a request that gave up meanwhile
                future.set_exception(error)

    def _tell(self, news: Sequence[tuple[Ticket, Event]]) -> None:
        """One wake-up of the event loop for a whole step."""
        if not news or self._loop is None or self._loop.is_closed():
            return

        def hand_over() -> None:
            for ticket, event in news:
                ticket.events.put_nowait(event)

        try:
            self._loop.call_soon_threadsafe(hand_over)
        except RuntimeError:  # closed in between
            return
