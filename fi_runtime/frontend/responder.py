"""One request's way back to its client."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb

from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.replies import Tensors
from fi_runtime.frontend.request_log import RequestRecord
from fi_runtime.shared_memory import is_low

log = logging.getLogger(__name__)


NO_MEMORY = "shared memory"
"""in what Triton's Python backend says where there is none"""


class Responder:
    """Sends a request's responses, the last of them once. Safe for use by several threads.

    NOTE: a sender that finds no shared memory for its last response takes no other one, not even
    an error, and the request would never end. So where memory is low, the tensors of the last one
    are put there before it is sent, by a request that the server turns down.

    NOTE: after its last response a sender's memory in the server is freed; asking it then whether
    its client has gone would read freed memory. So both happen under a lock.
    """

    def __init__(
        self,
        sender: Any,
        batched: bool,
        why_refused: Callable[[list[Any]], str],
        record: RequestRecord | None = None,
    ) -> None:
        """Of a new request.

        Args:
            sender: Triton's.
            batched: whether the model's tensors have a batch dimension.
            why_refused: asks the server something that it turns down; what it says.
            record: to be written at the request's end.
        """
        self._sender = sender
        self._batched = batched
        self._why_refused = why_refused
        self.record = record
        self._lock = threading.Lock()
        self._ended = False

    @property
    def has_ended(self) -> bool:
        """Whether the last response is out."""
        return self._ended

    def is_cancelled(self) -> bool:
        """Whether the client has gone; false once the last response is out. Never raises."""
        with self._lock:
            try:
                return not self._ended and bool(self._sender.is_cancelled())
            except Exception:
                log.exception("the server did not say whether a client has gone")
                return False

    def send(self, tensors: Tensors, last: bool) -> bool:
        """Send a response; false if the last one was out before.

        Raises:
            RequestError: there is no room for it in shared memory.
            Exception: whatever the server refused it with; nothing is out then.
        """
        outputs = [
            pb.Tensor(name, value[None] if self._batched else value)
            for name, value in tensors.items()
        ]
        if last and is_low(size := _bytes_of(tensors)):
            reason = self._why_refused(outputs)
            if NO_MEMORY in reason:
                raise RequestError(
                    "UNAVAILABLE", f"no shared memory for an answer of {size} bytes: {reason}"
                )
        return self._send(pb.InferenceResponse(outputs), "answered" if last else "")

    def fail(self, error: RequestError) -> None:
        """End the request with an error, unless its last response is out. Never raises."""
        try:
            triton_error = pb.TritonError(str(error), getattr(pb.TritonError, error.code))
            self._send(pb.InferenceResponse(error=triton_error), error.code)
        except Exception:
            log.exception("a request could not even be told: %s", error)

    def _send(self, response: Any, end: str) -> bool:
        """``end``: how the request ends with this response; empty if it goes on."""
        flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if end else 0
        with self._lock:
            if self._ended:
                return False
            self._sender.send(response, flags=flags)
            self._ended = bool(end)
        if end and self.record is not None:
            self.record.write(end)
        return True


def _bytes_of(tensors: Tensors) -> int:
    return sum(
        sum(map(len, value.flat)) if value.dtype == object else value.nbytes
        for value in tensors.values()
    )
