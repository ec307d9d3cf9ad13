"""Keeps threads that take turns on one core."""

import logging
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

CHECK_S = 1.0
TICKS = os.sysconf("SC_CLK_TCK")
"""a second, in which the kernel counts what it has run"""
FEW_CORES = 4
"""with fewer there is little to choose from, and little to gain"""
BUSY, CALM = 0.3, 0.1
"""of a core: what threads take when they are brought together, and when they are let go"""
SHARED = 0.3
"""of a core: what others take of it when the threads leave it"""
FULL = 0.6
"""of a core: what others take of one that the threads are not sent to"""


class OneCore:
    """Keeps the threads that send on one core while they are busy.

    Python's lock lets one of them run at a time. Spread over cores, each hands the lock to another
    core and has to wake it, which takes longer than what it then does. ``docs/BENCHMARKS.md`` has
    the difference, which is nearly a factor of two. When others need the core, the threads go to
    another one, and wherever the kernel wants when all are in use.

    RACE: processes may choose the same core at the same time. Each finds the other there at its
    next look, and draws again.

    Args:
        threads: that have been started.
    """

    def __init__(self, threads: Sequence[threading.Thread]) -> None:
        self._threads = threads
        self._allowed = sorted(os.sched_getaffinity(0))
        self._core: int | None = None
        self._checked = time.monotonic()
        self._taken: dict[int, float] = {}
        self._own = 0.0

    def check(self) -> None:
        """Look where the threads should be; to be called more often than CHECK_S. Never raises."""
        now = time.monotonic()
        elapsed = now - self._checked
        if elapsed < CHECK_S or len(self._allowed) < FEW_CORES:
            return
        try:
            taken, own = _busy_s(), self._own_s()
            if self._taken:  # the first look has nothing to compare with
                shares = {
                    core: max(0.0, taken.get(core, 0.0) - self._taken.get(core, 0.0)) / elapsed
                    for core in self._allowed
                }
                core = place((own - self._own) / elapsed, shares, self._core)
                if core != self._core:
                    self._move(core)
            self._checked, self._taken, self._own = now, taken, own
        except OSError as error:  # cores may be taken from a container while it runs
            log.warning("threads are not kept on one core any more: %s", error)
            self._allowed = []

    def _move(self, core: int | None) -> None:
        cores = self._allowed if core is None else [core]
        for thread in self._threads:
            if thread.native_id is not None:
                os.sched_setaffinity(thread.native_id, cores)
        self._core = core

    def _own_s(self) -> float:
        """Seconds that the threads have run so far.

        RACE: one may just have ended, of which the clock of its pthread must not be asked.
        """
        seconds = 0.0
        for thread in self._threads:
            stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text(encoding="utf-8")
            # Its name, in brackets, may have blanks; then user and system are the 12th and 13th.
            user, system = stat.rpartition(")")[2].split()[11:13]
            seconds += (int(user) + int(system)) / TICKS
        return seconds


def place(own: float, shares: Mapping[int, float], core: int | None) -> int | None:
    """Where threads should be: a core, or None for wherever the kernel wants.

    Args:
        own: cores that they kept busy lately.
        shares: of each core that they may use, how much of it was in use, theirs included.
        core: where they are.
    """
    if own < (BUSY if core is None else CALM):
        return None
    others = dict(shares)
    if core is not None:
        others[core] -= own
        if others[core] < SHARED:
            return core
    free = sorted((each for each in others if others[each] < FULL), key=lambda each: others[each])
    # One of the calmer ones, not the calmest: other processes look at the same numbers.
    return random.choice(free[: (len(free) + 1) // 2]) if free else None


def _busy_s() -> dict[int, float]:
    """Seconds that each core of the machine has been in use."""
    busy = {}
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total = user + nice + system + irq + softirq + steal
            busy[int(name.removeprefix("cpu"))] = total / TICKS
    return busy
