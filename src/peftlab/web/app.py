"""The lab's one FastAPI app: what every page and API of it shares. Routers bring the rest.

The app is for one person on one machine, and a browser runs other people's pages as well. So each request must name
this host (against DNS rebinding), know the token of this start, and, where it changes something, be JSON from our
own pages. Errors are {"error": {"type", "message"}}.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import PeftlabError, UserError

STATIC = Path(__file__).parent / "static"
MAX_BODY = 64 * 1024
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TYPES = {400: "bad_request", 403: "forbidden", 404: "not_found", 405: "not_allowed", 409: "stale"}
TYPES |= {413: "too_large", 415: "not_json", 422: "invalid"}


def create_app(token: str, port: int, routers: Iterable[APIRouter]) -> ASGIApp:
    """The app behind its guard; `token` and `port` are those of this start."""
    app = FastAPI(title="PEFT Lab", docs_url=None, redoc_url=None, openapi_url=None)
    for router in routers:
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(PeftlabError, _lab_error)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, token, port)


def error(status: int, message: str) -> JSONResponse:
    """The one shape of an error."""
    return JSONResponse({"error": {"type": TYPES.get(status, "failed"), "message": message}}, status)


def _http_error(_: Request, found: Any) -> Response:
    return error(found.status_code, str(found.detail))


def _invalid(_: Request, found: Any) -> Response:
    first = found.errors()[0]
    return error(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _lab_error(_: Request, found: Exception) -> Response:
    return error(400 if isinstance(found, UserError) else 500, str(found))


def _bug(_: Request, found: Exception) -> Response:
    return error(500, f"a bug of PEFT Lab's: {type(found).__name__}; the terminal tells more")


class Guard:
    """Refuses what does not come from our own pages, and puts the security headers on every reply.

    The token may be a cookie, `Authorization: Bearer`, or `?token=` of the printed URL, which a GET trades for the
    cookie, so that it does not stay in the address bar.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.cookie = f"peftlab-{port}"  # a browser sends cookies to every port of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope)
        reply = self._refusal(request) or self._welcome(request)
        if reply is None and request.method not in ("GET", "HEAD"):
            body = await _read(receive)
            if body is None:
                reply = error(413, f"the body is longer than {MAX_BODY} bytes, or broke off")
            else:
                receive = _again(body, receive)
        await (reply or self.app)(scope, receive, headed)

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in self.hosts:
            return error(403, f"this server answers to {' and '.join(sorted(self.hosts))} only")
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer if scheme == "Bearer" else request.cookies.get(self.cookie)
        if not (self._known(given) or self._known(request.query_params.get("token"))):
            return error(403, "the token is missing or of an earlier start: open the URL that the terminal shows")
        if request.method in ("GET", "HEAD"):
            return None
        if origin is not None and origin != f"http://{host}":
            return error(403, "the request comes from another site's page")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return error(415, "expected Content-Type: application/json")
        return None

    def _welcome(self, request: Request) -> Response | None:
        if request.method != "GET" or not self._known(request.query_params.get("token")):
            return None
        # One slash: //name would lead to another host.
        reply = RedirectResponse("/" + quote(request.url.path.lstrip("/")), 303)
        reply.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return reply

    def _known(self, given: str | None) -> bool:
        return secrets.compare_digest((given or "").encode(), self.token.encode())


async def _read(receive: Receive) -> bytes | None:
    """The request's body; None where it is too long, whatever its headers say, or where the client left."""
    body = b""
    while len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body if len(body) <= MAX_BODY else None
    return None


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
