"""How CUDA graphs are captured here: first called on the stream of captures, then captured there, then replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def aside(stream: Any) -> Iterator[None]:
    """What is called in it runs on the `stream` of captures, between what came before and what comes after.

    Libraries set up what they keep at a first call, a workspace for each stream: a capture cannot do so.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def capturing(stream: Any, pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """What is called in it is captured, not run. `pool`: whose memory it shares; by default it has its own."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (a communicator's watchdog, autograd, a data loader) may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield graph
