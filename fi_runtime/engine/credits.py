class Credits:
    """Leave to send the engine new sequences, so that all others wait in Triton's queue.

    While there is room, front ends hold equal shares of it ahead of need, which saves them round
    trips of a step each, and a few more while fewer than ``limit`` sequences are in the engine. So
    at most ``limit + STANDBY * front ends`` sequences are in the engine at a time.
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
        room = self._limit - sum(self._in_engine.values())
        if room <= 0 or not self._held:
            return {}
        share = max(0, room - sum(self._held.values())) // len(self._held)
        granted = {
            front_end: count
            for front_end, held in self._held.items()
            if (count := max(share, self.STANDBY - held)) > 0
        }
        for front_end, count in granted.items():
            self._held[front_end] += count
        return granted
