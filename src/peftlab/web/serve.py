"""uvicorn on a socket of ours: of this machine alone, unless told otherwise."""

from __future__ import annotations

import ipaddress
import secrets
import socket

import uvicorn
from starlette.types import ASGIApp

from ..errors import UserError

BACKLOG = 256


class Listener:
    """A port of an address, open from the start, and the token of this start. Raises UserError where it is taken."""

    def __init__(self, host: str, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(32)
        self.local = is_local(host)
        shown = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.name = f"[{shown}]" if ":" in shown else shown
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)
        except (OSError, OverflowError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or error
            where = "" if host == "127.0.0.1" else f" of {host}"
            raise UserError(f"--port {port}{where}: {reason}; 0 takes any free one") from None
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._stopping = False

    @property
    def base(self) -> str:
        """Where the app is, without a path."""
        return f"http://{self.name}:{self.port}"

    def url(self, path: str) -> str:
        """What to open in a browser. Whoever knows it may use the app."""
        return f"{self.base}{path}?token={self.token}"

    def run(self, app: ASGIApp) -> None:
        """Serves until `stop`, also one that came before, or a signal.

        uvicorn hands a signal on to the handler that was there before, once its requests have ended.
        """
        # No access log: it would print the token.
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        self._server = uvicorn.Server(config)
        self._server.should_exit = self._stopping
        self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Frees the port."""
        self._socket.close()

    def stop(self) -> None:
        """Ends `run` after the requests at hand."""
        self._stopping = True
        if self._server:
            self._server.should_exit = True


class Loopback(Listener):
    """A port that only this machine reaches."""

    def __init__(self, port: int = 0) -> None:
        super().__init__("127.0.0.1", port)


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
