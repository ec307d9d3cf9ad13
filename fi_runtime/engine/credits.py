class Credits:
    """Leave to send the engine new sequences, so that all others wait in Triton's queue.

    Each front end holds a few credits ahead of need, which saves it a round trip; they are
    replaced as it uses them while fewer than ``limit`` sequences are in the engine. So at most
    ``limit + STANDBY * front ends`` sequences are in the engine at a time.
    """

    STANDBY = 4

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_engine: dict[bytes, int] = {}
        self._held: dict[bytes, int] = {}

    def attach(self, front_end: bytes) -> None:
        self._in_engine[front_end] = self._held[front_end] = 0

    def detach(self, front_end: bytes) -> None:
        """Forget a front end with all it held."""
        del self._in_engine[front_end], self._held[front_end]

    def use(self, front_end: bytes) -> None:
        """A sequence has come."""
        self._held[front_end] -= 1
        self._in_engine[front_end] += 1

    def give_back(self, front_end: bytes) -> None:
        """A sequence has ended."""
        self._in_engine[front_end] -= 1

    def grant(self) -> dict[bytes, int]:
        """New credits for each front end that gets any."""
        if sum(self._in_engine.values()) >= self._limit:
            return {}
        granted = {f: self.STANDBY - held for f, held in self._held.items() if held < self.STANDBY}
        for front_end, count in granted.items():
            self._held[front_end] += count
        return granted
