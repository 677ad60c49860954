"""SIGINT and SIGTERM as a polite request first, as an order the second time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from ..errors import Interrupted
from .launched import rank, world_size
from .progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _give_back(handlers: Mapping[int, Any]) -> None:
    """Puts each signal's handler back; None stands for one that C code installed, which signal.signal cannot."""
    for signum, handler in handlers.items():
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)


class StopSignals:
    """The first signal within the block sets `requested`; the second leaves at once.

    The loop of a block `stepping` reads it after each step. Outside of it, where nothing that was learned is lost,
    `check` raises: before each batch of a measurement (see `batch_starts`), and before the first step. Not so in one of
    several processes, which must all leave at one place. `resumes`: what --resume would do now, for the last word.

    The handlers found on entry come back on exit. A block inside another passes the request on to the outer one, and
    takes over what that was asked before. Of several processes only the first leaves at the second signal; the others
    end when they miss it. Python delivers signals to the main thread only, so on any other thread the block changes
    nothing.
    """

    def __init__(self, resumes: Callable[[], str] = lambda: "goes on from the last checkpoint") -> None:
        self.requested: int | None = None
        self.in_steps = False
        self._resumes = resumes
        self._previous: dict[int, Any] = {}
        self._heeded: Callable[[], None]

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
                if isinstance(outer := self._outer(signum), StopSignals):
                    self.requested = self.requested or outer.requested
            self._heeded, Progress.heed = Progress.heed, self.check
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _give_back(self._previous)
        if self._previous:
            Progress.heed = self._heeded
        self._previous.clear()

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """While the block runs, a request is left to its loop, which ends a step and writes a checkpoint first."""
        self.check()
        self.in_steps = True
        try:
            yield
        finally:
            self.in_steps = False

    def check(self) -> None:
        """Raises Interrupted for a request that came outside of the steps; never of several processes."""
        if self.requested and not self.in_steps and world_size() == 1:
            raise Interrupted(self.requested)

    def request(self, signum: int) -> None:
        """Asks this block, and the blocks around it, to stop."""
        self.requested = signum
        if isinstance(outer := self._outer(signum), StopSignals):
            outer.request(signum)

    def _word(self, signum: int) -> str:
        """What --resume does, by the outermost block: of a demo, not of its stage."""
        if isinstance(outer := self._outer(signum), StopSignals):
            return outer._word(signum)
        try:
            return self._resumes()
        except OSError:  # a disk that fails is no reason to stay
            return "goes on from the last checkpoint"

    def _outer(self, signum: int) -> object:
        return getattr(self._previous.get(signum), "__self__", None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is not None and rank() == 0:
            if Progress.open:
                os.write(2, b"\n")
            os.write(2, f"left at once; --resume {self._word(signum)}\n".encode())
            os._exit(128 + signum)
        self.request(signum)
        if rank():
            return
        if self.in_steps:
            how = "after this step, with a checkpoint"
        else:
            how = "in a moment; nothing that was learned is lost" if world_size() == 1 else "once this is measured"
        # os.write, since print inside a handler can meet its own buffer's lock.
        Progress.open = False  # the message begins with the line's end
        os.write(2, f"\nstopping {how}; a second signal leaves at once\n".encode())


class EndSignals:
    """The first signal ends the wait for a person or for requests at once, and never the writing of what they said."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._end: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> EndSignals:
        self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        _give_back(self._before)

    @contextlib.contextmanager
    def heard(self, end: Callable[[], None] | None = None) -> Iterator[None]:
        """A block that raises Interrupted for a signal, also for one that came before it.

        Where it stands, without `end`. Code that must not break off anywhere, as an event loop that opens, gives `end`,
        which the signal calls for the block to come to its end by itself.
        """
        self._end = end or self._check
        try:
            if self._signum:
                self._end()
            yield
        finally:
            self._end = None
        self._check()

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self._signum = self._signum or signum
        if self._end:
            self._end()

    def _check(self) -> None:
        if self._signum:
            raise Interrupted(self._signum, f"stopped by {signal.Signals(self._signum).name}")
