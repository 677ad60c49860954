"""Which of several processes this one is, as torchrun and accelerate tell it. Alone it is rank 0 of 1.

One process writes and speaks: rank 0.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from ..errors import LabError, UserError, brief

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


class PeersLost(LabError):
    """Another process is gone, and this one knows no more: the reason is that one's to tell."""


def world_size() -> int:
    """How many processes work on the job. UserError where the launcher's variables tell nothing that can be."""
    return _told()[2]


def rank() -> int:
    """This process's number, from 0; it is the first one too where it is told nothing that can be."""
    with contextlib.suppress(UserError):
        return _told()[0]
    return 0


def local_rank() -> int:
    """Its number on this host: that of its GPU."""
    return _told()[1]


def _told() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE."""
    # All three, since a cluster's scheduler may set one of them where nobody launched anything.
    if not all(name in os.environ for name in NAMES):
        return 0, 0, 1
    for name in NAMES:
        if not re.fullmatch("[0-9]{1,9}", os.environ[name]):
            raise UserError(f"{name}: {os.environ[name]!r} is no number; a launcher sets it, so unset it without one")
    number, local, size = (int(os.environ[name]) for name in NAMES)
    if not number < size:
        raise UserError(f"RANK: {number} is none of the {size} processes that WORLD_SIZE tells of; the first is 0")
    return number, local, size


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Turns what torch says where another process is gone into a PeersLost of one line."""
    try:
        yield
    except RuntimeError as error:
        lost = type(error).__name__.startswith("Dist") or "gloo" in str(error)
        if world_size() == 1 or not lost:
            raise
        raise PeersLost(
            f"another of the {world_size()} processes ended, and this one cannot go on alone ({brief(error)})"
        ) from error
