"""Which of several processes this one is, as torchrun and accelerate tell it. Alone it is rank 0 of 1.

One process writes and speaks: rank 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import LabError, brief


class PeersLost(LabError):
    """Another process is gone, and this one knows no more: the reason is that one's to tell."""


def world_size() -> int:
    """How many processes work on the job."""
    # All three, since a cluster's scheduler may set one of them where nobody launched anything.
    told = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return int(os.environ["WORLD_SIZE"]) if told else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Its number on this host: that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


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
