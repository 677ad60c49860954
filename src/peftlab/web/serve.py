"""uvicorn on a loopback socket."""

from __future__ import annotations

import secrets
import socket

import uvicorn
from starlette.types import ASGIApp

from ..errors import UserError


class Loopback:
    """A port of 127.0.0.1, open from the start, and the token of this start. Raises UserError where it is taken."""

    def __init__(self, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(32)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen()
        except (OSError, OverflowError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port {port}: {reason}; 0 takes any free one") from None
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None

    def url(self, path: str) -> str:
        """What to open in a browser. Whoever knows it may use the app."""
        return f"http://127.0.0.1:{self.port}{path}?token={self.token}"

    def run(self, app: ASGIApp) -> None:
        """Serves until `stop` or a signal; uvicorn hands a signal on to the handler that was there before."""
        # No access log: it would print the token.
        config = uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=3,
        )
        self._server = uvicorn.Server(config)
        self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Frees the port."""
        self._socket.close()

    def stop(self) -> None:
        """Ends `run` after the requests at hand."""
        if self._server:
            self._server.should_exit = True
