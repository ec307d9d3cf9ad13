"""Notices a server that hangs, or that has crashed and does not end.

Its front ends cannot be trusted to: Triton has a metric of theirs wait for the server with Python's
lock held, and then no thread of that process runs any more. So they tell the engine of each of
their questions to the server, and fall silent with it.
"""

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from fi_runtime.messages import HEARTBEAT_S

CRASH_S = 8.0
"""between two looks at the server's threads; to say where it crashed should take it less"""
DEADLY = (1 << (signal.SIGABRT - 1)) | (1 << (signal.SIGSEGV - 1))


class ServerWatch:
    """Counts the seconds for which no front end that asks the server has had an answer.

    One that had is enough: where others say nothing, it is they that hang.

    Args:
        timeout_s: for the server to answer in.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._asking: set[bytes] = set()
        # Counted, since a clock would also run while this process was held.
        self._silent_beats = 0

    def asks(self, front_end: bytes) -> None:
        """A front end asks the server something, and had an answer to what it asked before."""
        self._asking.add(front_end)
        self._silent_beats = 0

    def ends(self, front_end: bytes) -> None:
        """A front end asks no more."""
        self._asking.discard(front_end)

    def beat(self) -> bool:
        """Another ``HEARTBEAT_S`` has passed; whether the server hangs."""
        self._silent_beats = self._silent_beats + 1 if self._asking else 0
        # The first beat may come as soon as somebody has asked.
        hangs = (self._silent_beats - 1) * HEARTBEAT_S >= self.timeout_s
        if hangs:
            self._silent_beats = 0
        return hangs


def watch_for_crash(server_pid: int, crashed: Callable[[], None], closing: threading.Event) -> None:
    """Call back each time that a thread of the server has been crashing for ``CRASH_S``.

    tritonserver 2.51 looks up where it crashed by a fork, which waits for a lock of malloc's. A
    thread that crashes in malloc has that lock itself, and the server neither ends nor answers.
    """
    before: set[str] = set()
    while not closing.wait(CRASH_S):
        now = crashing_threads(server_pid)
        if now & before:
            crashed()
        before = now


def crashing_threads(pid: int) -> set[str]:
    """The threads of a process that handle a deadly signal.

    It is blocked meanwhile, and no other is. Threads of libraries often have all of them blocked,
    for ever, and any thread has for a moment where it starts a process.
    """
    found = set()
    with contextlib.suppress(OSError):  # the process is ending
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):  # the thread is
                _, _, rest = status.read_text().partition("SigBlk:")
                blocked = int(rest.split()[0], 16) if rest else 0
                if blocked and not blocked & ~DEADLY:
                    found.add(status.parent.name)
    return found
