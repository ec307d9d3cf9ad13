"""The end of a server, or of a model, as its front ends see it: how long requests may still take.

Triton tells a Python model of its end only once every request has had its last response. So a front
end asks: a request to its own model, with an input that the model does not have, is turned down
before it reaches any queue, and what for says whether the model still serves.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

log = logging.getLogger(__name__)

ASK_S = 0.5
"""between two questions, each a tenth of a millisecond's work"""
EXITING = "Server not ready"
UNLOADING = "is not ready"
"""what a server says that takes no more requests, and of a model that takes none"""
EXIT_TIMEOUT_S = 30.0
"""tritonserver's own default"""
UNLOAD_S = 1.0
UNLOAD_INSTANCE_S = 1.3
"""what the server takes to end a model, and each of its instances one after another"""
OVERTIME_S = 1.5
"""for a server to end once its exit timeout has passed"""


class Drain:
    """Watches for the end of a model, and of its server.

    A thread of its own asks: all others may wait for a server that is stuck.

    Args:
        why_refused: asks the server something that it turns down; what it says.
        instances: of the model.
        server_pid: the parent of this process.
        closing: set once there is nothing left to watch.
        tell: told before each question, with True once none follows: who hears nothing more
            knows that the server hangs.
    """

    def __init__(
        self,
        why_refused: Callable[[list[Any]], str],
        instances: int,
        server_pid: int,
        closing: threading.Event,
        tell: Callable[[bool], None],
    ) -> None:
        self._why_refused = why_refused
        self._server_pid = server_pid
        self._closing = closing
        self._tell = tell
        self._exit_timeout_s = exit_timeout_s(server_pid)
        needed_s = ASK_S + UNLOAD_S + UNLOAD_INSTANCE_S * instances
        self.seconds = max(0.0, self._exit_timeout_s - needed_s)
        """for requests to be done in, of the server's exit timeout"""
        self._since: float | None = None
        self._served = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether requests in flight have had their time."""
        return self._since is not None and time.monotonic() - self._since >= self.seconds

    def has_served(self) -> None:
        """The server has handed a request over: from now on the model being away is its end."""
        self._served.set()

    def watch(self) -> None:
        """Ask until the model is closed; see to it that its server ends in time.

        NOTE: a question that is on its way while the server ends the instance can crash the server
        (2.51, a mutex that is gone). So none is asked before there was anything to end, least of
        all when a model is unloaded as soon as it has been loaded, nor once its end is known.
        """
        while not self._served.is_set():
            if self._closing.wait(ASK_S):
                return
        what = ""
        while not what and not self._closing.wait(ASK_S):
            self._tell(False)
            answer = self._answer()
            if EXITING in answer:
                what = "server"
            elif UNLOADING in answer:
                what = "model"
        if what:
            self._tell(True)
            self._begin(what)
        if not self._closing.wait(self._exit_timeout_s + OVERTIME_S) and what == "server":
            self._kill_server()

    def _begin(self, what: str) -> None:
        self._since = time.monotonic()
        log.info("the %s is ending; requests in flight have %.1f s", what, self.seconds)

    def _answer(self) -> str:
        question = pb.Tensor("is it ending?", np.zeros(1, dtype=np.int32))
        return self._why_refused([question])

    def _kill_server(self) -> None:
        """End a server that outlives its exit timeout, as one with an open gRPC stream does.

        RACE: only while this process is its child is the number the server's.
        """
        if os.getppid() == self._server_pid:
            log.error("the server outlives its exit timeout, and is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._server_pid, signal.SIGKILL)


def exit_timeout_s(server_pid: int) -> float:
    """The option that tritonserver was started with."""
    name, seconds = "--exit-timeout-secs", EXIT_TIMEOUT_S
    with contextlib.suppress(OSError, ValueError):
        command = Path(f"/proc/{server_pid}/cmdline").read_bytes().split(b"\0")
        words = [os.fsdecode(word) for word in command]
        for word, following in zip(words, [*words[1:], ""], strict=True):
            key, equals, value = word.partition("=")
            if key == name:
                seconds = float(value if equals else following)
    return seconds
