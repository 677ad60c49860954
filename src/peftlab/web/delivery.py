"""From a ticket's pieces to the reply of its request: whole, or as server-sent events; given up where nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import PeftlabError
from .app import ApiError
from .reply import Piece, Token
from .schemas import Form, usage_of
from .worker import Closed, Full, Ticket

T = TypeVar("T")
Pieces = AsyncIterator[tuple[int, Piece]]
GONE = 499  # for the log: nobody reads it


async def deliver(
    request: Request, ticket: Ticket, form: Form, prompt: int, deadline: float, stream: bool, count: bool
) -> Response:
    """The reply to a ticket that was submitted. `prompt`: tokens of the prompts; `deadline`: on the loop's clock;
    `count`: whether a stream ends with its usage. The ticket is left, whatever happens."""
    pieces = arriving(ticket, deadline)
    streaming = False
    try:
        if not stream:
            choices = await unless_gone(request, _whole(ticket, pieces))
            if choices is None:
                return Response(status_code=GONE)
            return JSONResponse(form.whole(choices, usage(ticket, prompt)))
        # Errors up to the first piece have a status of their own.
        first = await unless_gone(request, _next(pieces))
        if first is None:
            return Response(status_code=GONE)
        streaming = True
        return Stream(ticket, _events(form, first, pieces, ticket, prompt, count))
    finally:
        if not streaming:
            ticket.leave()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the worker raises, as errors of the API."""
    try:
        yield
    except Full:
        raise ApiError(429, "too many requests are waiting; try again", None, "queue_full", Retry_After="1") from None
    except Closed:
        raise ApiError(503, "the server is going down", None, "closing", Retry_After="5") from None
    except TimeoutError:
        raise ApiError(503, "the request took longer than this server allows", None, "timeout") from None
    except (ApiError, PeftlabError):
        raise
    except Exception as error:
        told = f"the model failed: {type(error).__name__}; the terminal tells more"
        raise ApiError(500, told, None, "failed") from error


async def arriving(ticket: Ticket, deadline: float) -> Pieces:
    """The pieces of a ticket until all its choices have ended. Raises ApiError."""
    going_on, clock = len(ticket.jobs), asyncio.get_running_loop().time
    with refusals():
        while going_on:
            event = await asyncio.wait_for(ticket.events.get(), deadline - clock())
            if isinstance(event, BaseException):
                raise event
            going_on -= event[1].finish is not None
            yield event


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None where the client left before it came."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


def usage(ticket: Ticket, prompt: int) -> dict[str, int]:
    """The tokens of a request and of its reply."""
    return usage_of(prompt, sum(job.reply.count for job in ticket.jobs))


async def _next(pieces: Pieces) -> tuple[int, Piece]:
    return await anext(pieces)


async def _whole(ticket: Ticket, pieces: Pieces) -> list[tuple[str, list[Token], str]]:
    """(text, tokens, finish) of every choice."""
    texts = [""] * len(ticket.jobs)
    tokens: list[list[Token]] = [[] for _ in ticket.jobs]
    async for index, piece in pieces:
        texts[index] += piece.text
        tokens[index] += piece.tokens
    return [(texts[i], tokens[i], str(job.reply.finish)) for i, job in enumerate(ticket.jobs)]


async def _events(
    form: Form, first: tuple[int, Piece], pieces: Pieces, ticket: Ticket, prompt: int, count: bool
) -> AsyncIterator[str]:
    offsets = [0] * len(ticket.jobs)
    try:
        if form.chat:
            for index in range(len(offsets)):
                yield _sse(form.opening(index))
        event: tuple[int, Piece] | None = first
        while event:
            index, piece = event
            yield _sse(form.piece(index, piece, offsets[index]))
            offsets[index] += len(piece.text)
            event = await anext(pieces, None)
        if count:
            yield _sse(form.closing(usage(ticket, prompt)))
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the head of the reply is gone: its body is where this can be told
        yield _sse(error.body)


def _sse(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


class Stream(StreamingResponse):
    """Server-sent events of a ticket, which is left whatever ends them."""

    def __init__(self, ticket: Ticket, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.leave()
