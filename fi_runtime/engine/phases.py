"""Where the time of a start goes."""

import os
import time
from pathlib import Path


class Phases:
    """Seconds of each phase; one ends where the next begins.

    Args:
        begin: of the first, on ``time.monotonic``'s clock.
    """

    def __init__(self, begin: float | None = None) -> None:
        self._begin = self._last = time.monotonic() if begin is None else begin
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """The phase of that name is over."""
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{self._last - self._begin:.1f} s: {parts}"


def process_begin() -> float:
    """When this process was started, on ``time.monotonic``'s clock."""
    # man 5 proc_pid_stat: field 22, of those that follow the name in parentheses the 20th.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
