"""The lab's one FastAPI app: what every page and API of it shares. Routers bring the rest.

The app is for one person on one machine, and a browser runs other people's pages as well. So each request must name
this host (against DNS rebinding), know the token of this start, and, where it changes something, be JSON from our
own pages. Errors are {"error": {"type", "message"}}.

Where there is an API for programs, below /v1, it takes a key in the token's place, or nothing on this machine alone;
its errors have the shape of OpenAI's.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
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
MAX_API_BODY = 512 * 1024
DRAINED = 16 * 1024 * 1024  # of a body that is too long: read on, since a client that is cut off never sees the reply
BODY_S = 30.0  # within which a body must be here
API = "/v1/"
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
TYPES = {400: "bad_request", 403: "forbidden", 404: "not_found", 405: "not_allowed", 408: "too_slow", 409: "stale"}
TYPES |= {413: "too_large", 415: "not_json", 422: "invalid"}
API_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Programs:
    """How programs use the API: with `key`, or, where it is None, as they like. `anywhere`: the server listens to more
    than this machine, by whatever name others call it."""

    key: str | None = None
    anywhere: bool = False

    def __post_init__(self) -> None:
        if self.anywhere and not self.key:
            raise ValueError("beyond this machine a key is needed")


class ApiError(Exception):
    """An error of the API; `param` is the field that it is about, `code` what a program tells it by."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kind = API_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def create_app(
    token: str, port: int, routers: Iterable[APIRouter], programs: Programs | None = None, host: str = "127.0.0.1"
) -> ASGIApp:
    """The app behind its guard; `token`, `port` and `host`, as in a URL, are those of this start. `programs`: who may
    use the API."""
    app = FastAPI(title="PEFT Lab", docs_url=None, redoc_url=None, openapi_url=None)
    for router in routers:
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(PeftlabError, _lab_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, token, port, programs, host)


def error(request: Request, status: int, message: str, param: str | None = None, **headers: str) -> JSONResponse:
    """An error in the shape of the place that it is of."""
    if request.url.path.startswith(API):
        return _api_error(request, ApiError(400 if status in (415, 422) else status, message, param, **headers))
    return JSONResponse({"error": {"type": TYPES.get(status, "failed"), "message": message}}, status, headers)


def _api_error(_: Request, found: Any) -> JSONResponse:
    return JSONResponse(found.body, found.status, found.headers)


def _http_error(request: Request, found: Any) -> Response:
    return error(request, found.status_code, str(found.detail))


def _invalid(request: Request, found: Any) -> Response:
    first = found.errors()[0]
    place, message = [str(part) for part in first["loc"]], str(first["msg"]).removeprefix("Value error, ")
    return error(request, 422, f"{'.'.join(place)}: {message}", ".".join(place[1:]) or None)


def _lab_error(request: Request, found: Exception) -> Response:
    return error(request, 400 if isinstance(found, UserError) else 500, str(found))


def _bug(request: Request, found: Exception) -> Response:
    return error(request, 500, f"a bug of PEFT Lab's: {type(found).__name__}; the terminal tells more")


class Guard:
    """Refuses what does not come from our own pages, and puts the security headers on every reply.

    The token may be a cookie, `Authorization: Bearer`, or `?token=` of the printed URL, which a GET trades for the
    cookie, so that it does not stay in the address bar.
    """

    def __init__(
        self, app: ASGIApp, token: str, port: int, programs: Programs | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.app, self.token, self.programs = app, token, programs
        names = {host, "127.0.0.1", "localhost", "[::1]"}
        # A client leaves out the port that HTTP has anyway.
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
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
            body = await self._body(request, receive)
            if isinstance(body, bytes):
                receive = _again(body, receive)
            else:
                reply = body
        await (reply or self.app)(scope, receive, headed)

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        programs = self.programs
        if (host or "").lower() not in self.hosts and not (programs and programs.anywhere):
            return error(request, 403, f"this server answers to {' and '.join(sorted(self.hosts))} only")
        reading = request.method in ("GET", "HEAD")
        if programs and reading and request.url.path == "/health":
            return None
        if not self._trusted(request):
            if programs and programs.key and request.url.path.startswith(API):
                told = "give the API key as Authorization: Bearer KEY"
                return error(request, 401, told, WWW_Authenticate="Bearer")
            told = "the token is missing or of an earlier start: open the URL that the terminal shows"
            return error(request, 403, told)
        if reading:
            return None
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return error(request, 403, "the request comes from another site's page")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return error(request, 415, "expected Content-Type: application/json")
        return None

    def _trusted(self, request: Request) -> bool:
        """Whether it has the token, or, for the API, what `programs` asks for."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else None
        if self._known(given or request.cookies.get(self.cookie)) or self._known(request.query_params.get("token")):
            return True
        if self.programs is None or not request.url.path.startswith(API):
            return False
        if self.programs.key:
            return secrets.compare_digest((given or "").encode(), self.programs.key.encode())
        # No program sends this header: it is how a browser says that another site's page asks.
        return request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")

    def _welcome(self, request: Request) -> Response | None:
        if request.method != "GET" or not self._known(request.query_params.get("token")):
            return None
        # One slash: //name would lead to another host.
        reply = RedirectResponse("/" + quote(request.url.path.lstrip("/")), 303)
        reply.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return reply

    def _known(self, given: str | None) -> bool:
        return secrets.compare_digest((given or "").encode(), self.token.encode())

    async def _body(self, request: Request, receive: Receive) -> bytes | Response:
        limit = MAX_API_BODY if request.url.path.startswith(API) else MAX_BODY
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive, limit)
        except TimeoutError:
            return error(request, 408, f"the body was not here within {BODY_S:.0f} s")
        if body is None:
            return error(request, 413, f"the body is longer than {limit} bytes, or broke off")
        return body


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The request's body; None where it is too long, whatever its headers say, or where the client left."""
    parts, size = [], 0
    while size <= DRAINED:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        if not message.get("more_body"):
            break
    return b"".join(parts) if size <= limit else None


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
