"""A line of JSON for each request: what it cost and how it ended, and none of its texts unless they are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .worker import Ticket

Write = Callable[[dict[str, Any]], None]


def facts(request: Request) -> dict[str, Any]:
    """What a route knows of its request, for the log. `texts` are logged on demand only."""
    found: dict[str, Any] = request.scope.setdefault("peftlab", {})
    return found


class Log:
    """Around the whole app, so that what its guard refuses is logged too. The query, which may hold a token, is not."""

    def __init__(self, app: ASGIApp, write: Write, texts: bool = False) -> None:
        self.app, self.write, self.texts = app, write, texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known: dict[str, Any] = scope.setdefault("peftlab", {})
        begin, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            row: dict[str, Any] = {"time": datetime.now(UTC).isoformat("T", "milliseconds")}
            row |= {"method": scope["method"], "path": scope["path"], "status": status or 499}
            row["seconds"] = round(time.monotonic() - begin, 4)
            row |= self._told(known, begin)
            self.write(row)

    def _told(self, known: dict[str, Any], begin: float) -> dict[str, Any]:
        ticket, texts = known.pop("ticket", None), known.pop("texts", {})
        row = dict(known)
        if isinstance(ticket, Ticket):
            row["completion_tokens"] = sum(job.reply.count for job in ticket.jobs)
            row["finish"] = [job.reply.finish for job in ticket.jobs]
            for name, at in (("queued_s", ticket.began), ("first_s", ticket.first)):
                row[name] = None if at is None else round(at - begin, 4)
        return row | texts if self.texts else row
