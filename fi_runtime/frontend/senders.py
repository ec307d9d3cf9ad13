"""Threads that make text of tokens and send it, each for requests of its own."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from fi_runtime.messages import Output

Request = TypeVar("Request")


class Sender(Generic[Request]):
    """Sends the responses of its requests, one after another.

    What comes while a response is being sent joins those that wait: nothing is held back to make a
    group, and nothing that is there is left for another response.

    Args:
        take: adds an output to its request; that request, if it has a response to send.
        respond: sends what responses a request has. Neither may raise.
    """

    def __init__(
        self, take: Callable[[Output], Request | None], respond: Callable[[Request], None]
    ) -> None:
        self._take = take
        self._respond = respond
        self._queue: SimpleQueue[list[Output]] = SimpleQueue()
        self._given = 0
        """lists of outputs that its thread was given"""
        self._done = 0
        """those after which it had nothing left to send"""
        self._waiting: dict[Request, None] = {}
        """requests with a response to send, in the order of their tokens"""
        # A daemon, since a server that dies closes nothing: it would keep the process from its end.
        self.thread = threading.Thread(target=self._run, name="replies", daemon=True)
        self.thread.start()

    def give(self, outputs: list[Output], alone: bool) -> None:
        """Have what its requests got sent; always called by the same thread.

        Args:
            alone: whether there is nothing else to do. Then the caller itself sends it, unless
                the thread has not sent what came before: to wake it takes as long as to send.
        """
        # Only the caller gives, so that a thread which has nothing to send stays so meanwhile.
        if alone and self._done == self._given:
            self._take_all(outputs)
            self._respond_to_all()
        else:
            self._given += 1
            self._queue.put(outputs)

    def close(self) -> None:
        """Let the thread end, once it has sent everything."""
        self._queue.put([])

    def _run(self) -> None:
        taken = 0
        while True:
            while not (self._waiting and self._queue.empty()):
                if not self._waiting:
                    self._done = taken
                outputs = self._queue.get()
                if not outputs:
                    self._respond_to_all()
                    return
                taken += 1
                self._take_all(outputs)
            self._respond_first()

    def _take_all(self, outputs: list[Output]) -> None:
        for output in outputs:
            if (request := self._take(output)) is not None:
                self._waiting.setdefault(request)

    def _respond_to_all(self) -> None:
        while self._waiting:
            self._respond_first()

    def _respond_first(self) -> None:
        request = next(iter(self._waiting))
        del self._waiting[request]
        self._respond(request)
