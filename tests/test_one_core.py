"""Threads that send stay on a core of their own, and let others have it."""

import os
import threading
import time

import pytest

from fi_runtime.frontend import one_core
from fi_runtime.frontend.one_core import OneCore, place

IDLE = dict.fromkeys(range(8), 0.05)


def test_calm_threads_are_wherever_the_kernel_wants() -> None:
    assert place(0.2, IDLE, None) is None
    assert place(0.05, IDLE | {3: 0.05}, 3) is None


def test_busy_threads_get_a_core_and_stay_while_it_is_theirs() -> None:
    assert place(0.9, IDLE, None) in IDLE
    for own in (0.15, 0.9):
        assert place(own, IDLE | {3: own + 0.2}, 3) == 3


def test_nobody_is_sent_to_a_core_that_is_in_use() -> None:
    shares = {core: 0.9 if core < 4 else 0.3 for core in range(8)}
    found = {place(0.9, shares, None) for _ in range(200)}
    assert len(found) > 1
    assert found <= {4, 5, 6, 7}


def test_two_on_one_core_part() -> None:
    """Each sees half of the core taken by another; soon both have cores of their own."""
    at = [3, 3]
    for _ in range(20):
        shares = [dict(IDLE), dict(IDLE)]
        together = at[0] == at[1]
        for own in shares:
            for core in at:
                own[core] = 1.0
        new = [place(0.5 if together else 0.9, own, at[i]) for i, own in enumerate(shares)]
        at = [core for core in new if core is not None]
        assert len(at) == 2
    assert at[0] != at[1]


def test_where_all_cores_are_in_use_the_kernel_decides() -> None:
    assert place(0.9, dict.fromkeys(range(8), 0.8), None) is None
    assert place(0.3, dict.fromkeys(range(8), 1.0), 3) is None
    assert place(0.5, dict.fromkeys(range(8), 1.0), 3) == 3  # half of it is better than none


def test_busy_threads_are_brought_together_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_core, "FEW_CORES", 1)
    monkeypatch.setattr(one_core, "CHECK_S", 0.05)
    monkeypatch.setattr(one_core, "FULL", 2.0)  # other tests may use all of this machine
    monkeypatch.setattr(one_core, "SHARED", 2.0)
    allowed = os.sched_getaffinity(0)
    busy, end = threading.Event(), threading.Event()

    def run() -> None:
        while not end.is_set():
            busy.wait(0.01)
            while busy.is_set():
                sum(range(1000))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    keeper = OneCore(threads)

    def where_after(seconds: float) -> list[set[int]]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.02)
            keeper.check()
        return [os.sched_getaffinity(thread.native_id or 0) for thread in threads]

    busy.set()
    first, second = where_after(0.6)
    assert first == second
    assert len(first) == 1
    busy.clear()
    assert where_after(0.4) == [allowed, allowed]
    end.set()
