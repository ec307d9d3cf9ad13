"""Notices a server that hangs.

Its front ends cannot be trusted to: Triton has a metric of theirs wait for the server with Python's
lock held, and then no thread of that process runs any more. So they tell the engine of each of
their questions to the server, and fall silent with it.
"""

from fi_runtime.messages import HEARTBEAT_S


class ServerWatch:
    """Counts the seconds for which no front end that asks the server has had an answer.

    One that had is enough: where others say nothing, it is they that hang.

    Args:
        timeout_s: for the server to answer in.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
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
        hangs = (self._silent_beats - 1) * HEARTBEAT_S >= self._timeout_s
        if hangs:
            self._silent_beats = 0
        return hangs
