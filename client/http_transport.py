"""To a server over HTTP."""

import contextlib
import http
import http.client
import json
import time
from collections.abc import Generator
from typing import Any
from urllib.parse import quote

import gevent
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from client.errors import ClientError, TimedOut
from client.request import Piece, Request
from client.tensors import to_piece, to_tensors
from client.transport import CONNECT_TIMEOUT_S, Address, Transport

TRITON_CODES = {
    400: "INVALID_ARG",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNSUPPORTED",
    503: "UNAVAILABLE",
}
"""Triton's codes by the HTTP status it answers with."""

EVENT_DATA = b"data:"
"""how a line with content starts in a stream of server-sent events"""

FIRST_ERROR_STATUS = 400
SERVERS_TIMEOUT_S = 1.0
"""that the server's timeout is longer than the client's, which is to be the first"""
MIN_TIMEOUT_S = 1e-3
"""what is left when nothing is; 0 would mean not to wait for data at all"""

NETWORK_ERRORS = (OSError, http.client.HTTPException)


class HttpTransport(Transport):
    """Streams from /generate_stream, as server-sent events; what is not streamed is an infer.

    Each request has a connection of its own, since closing that is how HTTP cancels. Triton hears
    of it for a stream; an infer it answers whoever listens, so that says how long to try.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        # Beneath tritonclient is gevent, which else prints a Ctrl-C before it passes it on.
        hub = gevent.get_hub()
        hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)

    def open(self) -> None:
        try:
            status = self._get_status("/v2/health/live")
        except OSError as error:
            raise self.unreachable(error) from None
        except http.client.HTTPException as error:
            raise self.unreachable(f"what listens there does not speak HTTP: {error}") from None
        if status != http.HTTPStatus.OK:
            raise self.unreachable(f"HTTP status {status} for /v2/health/live")

    def close(self) -> None:
        """Nothing is left open between requests."""

    def is_ready(self, model: str) -> bool:
        try:
            return self._get_status(f"/v2/models/{quote(model)}/ready") == http.HTTPStatus.OK
        except NETWORK_ERRORS:
            return False

    def generate(self, request: Request) -> Generator[Piece]:
        try:
            if request.stream:
                yield from self._stream(request)
            else:
                yield self._infer(request)
        except TimeoutError:
            raise TimedOut(request.timeout_s) from None
        except NETWORK_ERRORS as error:
            raise self.lost(error) from None

    def _infer(self, request: Request) -> Piece:
        client = triton.InferenceServerClient(
            f"{self.address.netloc}{self.address.path}",
            connection_timeout=min(CONNECT_TIMEOUT_S, request.timeout_s),
            network_timeout=request.timeout_s,
        )
        try:
            inputs = to_tensors(request.inputs(), triton.InferInput)
            timeout_us = int((request.timeout_s + SERVERS_TIMEOUT_S) * 1e6)
            return to_piece(client.infer(request.door, inputs, timeout=timeout_us))
        except InferenceServerException as error:
            raise self._explain(request, int(error.status() or 0), error.message()) from None
        finally:
            client.close()

    def _stream(self, request: Request) -> Generator[Piece]:
        deadline = time.monotonic() + request.timeout_s
        finished = False
        with contextlib.closing(
            self._connection(min(CONNECT_TIMEOUT_S, request.timeout_s))
        ) as connection:
            connection.connect()
            sock = connection.sock  # the connection forgets it once the response takes it over
            path = f"{self.address.path}/v2/models/{quote(request.door)}/generate_stream"
            connection.request("POST", path, body=json.dumps(request.inputs()))
            sock.settimeout(max(deadline - time.monotonic(), MIN_TIMEOUT_S))
            with connection.getresponse() as response:
                while line := response.readline():
                    event = _parse_event(line)
                    if "error" in event:
                        raise self._explain(request, response.status, str(event["error"]))
                    if event:
                        piece = Piece.from_outputs(event)
                        finished = bool(piece.finish_reason)
                        yield piece
                    sock.settimeout(max(deadline - time.monotonic(), MIN_TIMEOUT_S))
        if not finished:
            raise self.lost("the answer ended without a finish reason")

    def _get_status(self, path: str) -> int:
        connection = self._connection(CONNECT_TIMEOUT_S)
        try:
            connection.request("GET", f"{self.address.path}{path}")
            return connection.getresponse().status
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address.host, self.address.port, timeout=timeout_s)

    def _explain(self, request: Request, status: int, message: str) -> ClientError:
        # An error in mid-answer comes after the status of success, and has no code.
        code = TRITON_CODES.get(status, f"HTTP {status}") if status >= FIRST_ERROR_STATUS else ""
        return self.failure(request, code, message)


def _parse_event(line: bytes) -> dict[str, Any]:
    """A line of server-sent events, or of a plain error's body; empty where it has no content."""
    content = line.removeprefix(EVENT_DATA).strip()
    if not content:
        return {}
    try:
        event = json.loads(content)
    except ValueError:
        event = None
    # What is not Triton's is an error page of something between it and us.
    return event if isinstance(event, dict) else {"error": content[:200].decode(errors="replace")}
