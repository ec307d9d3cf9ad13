"""When an engine that died is started again, and when it no longer is."""

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
PROVEN_S = 60.0
"""an engine that has been there for so long can work, even if nobody has asked it anything"""


class Restarts:
    """Counts the engines that died in a row, each before it had proved that it can work.

    Args:
        most: how many of them are started again; 0: none that dies is, whatever it did.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.deaths = 0
        """in a row"""

    def died(self, proven: bool) -> float | None:
        """Seconds to wait before the next one is started; None: it is to be left alone."""
        self.deaths = 1 if proven else self.deaths + 1
        if self.deaths > self._most:
            return None
        return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.deaths - 1))
