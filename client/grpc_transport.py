"""To a server over gRPC."""

import contextlib
import queue
from collections.abc import Generator
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from client.errors import ClientError, TimedOut
from client.request import Piece, Request
from client.tensors import to_piece, to_tensors
from client.transport import CONNECT_TIMEOUT_S, Address, Transport

TRITON_CODES = {"INVALID_ARGUMENT": "INVALID_ARG", "UNIMPLEMENTED": "UNSUPPORTED"}
"""Triton's names of gRPC's codes, where they differ."""


class GrpcTransport(Transport):
    """Streams on one bidirectional call a request; what is not streamed is a unary call.

    NOTE: a stream's errors have no code. Triton would send it for the header triton_grpc_error,
    but then logs an internal error each time, and 2.51 has crashed after such streams.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._client = triton.InferenceServerClient(address.netloc)

    def open(self) -> None:
        try:
            self._client.is_server_live(client_timeout=CONNECT_TIMEOUT_S)
        except InferenceServerException as error:
            self.close()
            raise self.unreachable(error.message()) from None

    def close(self) -> None:
        # Before the client's own close, which would wait for the answer's end.
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def is_ready(self, model: str) -> bool:
        try:
            return bool(self._client.is_model_ready(model, client_timeout=CONNECT_TIMEOUT_S))
        except InferenceServerException:
            return False

    def generate(self, request: Request) -> Generator[Piece]:
        try:
            if request.stream:
                yield from self._stream(request)
            else:
                yield self._infer(request)
        except InferenceServerException as error:
            raise self._explain(request, error) from None

    def _infer(self, request: Request) -> Piece:
        inputs = to_tensors(request.inputs(), triton.InferInput)
        return to_piece(self._client.infer(request.door, inputs, client_timeout=request.timeout_s))

    def _stream(self, request: Request) -> Generator[Piece]:
        responses: queue.SimpleQueue[tuple[Any, InferenceServerException | None]]
        responses = queue.SimpleQueue()
        over = False
        self._client.start_stream(
            callback=lambda result, error: responses.put((result, error)),
            stream_timeout=request.timeout_s,
        )
        try:
            # It raises where the stream has failed already, which comes with its reason below.
            with contextlib.suppress(InferenceServerException):
                self._client.async_stream_infer(
                    request.door,
                    to_tensors(request.inputs(), triton.InferInput),
                    # Every model's stream then says where it ends, even if that has no data.
                    enable_empty_final_response=True,
                )
            while not over:
                result, error = responses.get()
                if error is not None:
                    over = True
                    raise error
                response = result.get_response()
                over = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield to_piece(result)
        finally:
            # NOTE: not where it is over: on 2.51, a stream cancelled right after its error has kept
            # the model from unloading.
            self._client.stop_stream(cancel_requests=not over)

    def _explain(self, request: Request, error: InferenceServerException) -> ClientError:
        name = (error.status() or "").removeprefix("StatusCode.")
        code = TRITON_CODES.get(name, name)
        if code == "DEADLINE_EXCEEDED":
            return TimedOut(request.timeout_s)
        return self.failure(request, code, error.message())
