"""The one interface of the ways to a server."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urlsplit

from client.errors import ClientError, Refused, Unreachable, one_line
from client.request import Piece, Request

Protocol = Literal["grpc", "http"]

DEFAULT_PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}
CONNECT_TIMEOUT_S = 5.0
"""for a server to say that it is there"""

MAYBE_NOT_READY = {"", "NOT_FOUND", "UNAVAILABLE"}
"""Codes of the server's that may mean a model which is not there to answer."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    protocol: Protocol
    host: str
    port: int
    path: str
    """what a proxy puts before the server's own paths, empty or with a leading slash"""

    @classmethod
    def parse(cls, protocol: Protocol, url: str | None) -> "Address":
        """Read host, host:port or protocol://host:port; None is this host.

        Raises:
            ValueError: it is none of these.
        """
        given = url if url is not None else "127.0.0.1"
        parts = urlsplit(given if "://" in given else f"{protocol}://{given}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme != protocol or not parts.hostname or port == -1:
            raise ValueError(
                f"url {given!r}: expected HOST, HOST:PORT or {protocol}://HOST:PORT "
                f"for protocol {protocol}, such as 127.0.0.1:{DEFAULT_PORTS[protocol]}"
            )
        path = parts.path.rstrip("/") if protocol == "http" else ""
        return cls(protocol, parts.hostname, port or DEFAULT_PORTS[protocol], path)

    @property
    def netloc(self) -> str:
        """host:port, an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}://{self.netloc}{self.path}"


class Transport(ABC):
    """A connection to a server. Not safe for use by several threads."""

    def __init__(self, address: Address) -> None:
        self.address = address

    @abstractmethod
    def open(self) -> None:
        """Connect.

        Raises:
            Unreachable: nothing answers there.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave; what is still under way is cancelled on the server."""

    @abstractmethod
    def is_ready(self, model: str) -> bool:
        """Whether the server is there, and this model on it ready."""

    @abstractmethod
    def generate(self, request: Request) -> Generator[Piece]:
        """Ask, and give the answer's pieces as they come.

        The request is sent with the first `next`; closing the iterator cancels it on the server.

        Raises:
            Refused: the server gave an error.
            Unreachable: the connection was lost, or the model is not ready.
            TimedOut: the answer took longer than the request allows.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def failure(self, request: Request, code: str, message: str) -> ClientError:
        """What an error means that the server, or the library that talks to it, came up with."""
        message = one_line(message)
        if code in MAYBE_NOT_READY and not self.is_ready(request.door):
            return Unreachable(f"{request.door} is not ready at {self.address}: {message}")
        return Refused(code, message)

    def unreachable(self, reason: object) -> Unreachable:
        """For a server that was never met."""
        return Unreachable(
            f"no server at {self.address} ({one_line(reason)}); start one with: make serve; "
            "or say with --url where it is"
        )

    def lost(self, reason: object) -> Unreachable:
        """For a server that went away in mid-answer."""
        return Unreachable(f"lost the connection to {self.address}: {one_line(reason)}")
