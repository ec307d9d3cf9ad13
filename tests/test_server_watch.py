"""A server that hangs is noticed, and no other: what front ends say, and the engine counts."""

import os
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fi_runtime.engine.server_watch import ServerWatch, crashing_threads


def beats_until_it_hangs(watch: ServerWatch, most: int = 20) -> int | None:
    return next((beat for beat in range(1, most + 1) if watch.beat()), None)


def test_a_server_that_nobody_asks_does_not_hang() -> None:
    watch = ServerWatch(3.0)
    assert beats_until_it_hangs(watch) is None
    watch.asks(b"a")
    watch.ends(b"a")
    assert beats_until_it_hangs(watch) is None
    watch.ends(b"never asked")
    watch.asks(b"a")
    # The first beat comes at once, perhaps.
    assert beats_until_it_hangs(watch) == 4
    assert beats_until_it_hangs(watch) == 4, "the next word of it is as late"


def test_a_front_end_that_goes_on_asking_is_enough() -> None:
    watch = ServerWatch(3.0)
    watch.asks(b"hangs itself")
    for _ in range(20):
        watch.asks(b"asks")
        assert not any(watch.beat() for _ in range(3))
    watch.ends(b"asks")
    assert beats_until_it_hangs(watch) == 1
    watch.asks(b"asks")
    watch.ends(b"hangs itself")
    assert beats_until_it_hangs(watch) == 4


def test_a_thread_that_handles_a_deadly_signal_is_found() -> None:
    ready, over = threading.Barrier(4), threading.Event()

    def handle() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
        ready.wait(10)
        over.wait(10)

    def block_another() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        ready.wait(10)
        over.wait(10)

    def block_all() -> None:
        """As threads of zmq do, and timers of libc's."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ready.wait(10)
        over.wait(10)

    threads = [threading.Thread(target=each) for each in (handle, block_another, block_all)]
    for thread in threads:
        thread.start()
    ready.wait(10)
    assert crashing_threads(os.getpid()) == {str(threads[0].native_id)}
    over.set()
    for thread in threads:
        thread.join(10)
    assert crashing_threads(os.getpid()) == set()


@pytest.fixture
def drain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a stand-in for the one that exists in Triton's stub only."""
    backend = SimpleNamespace(Tensor=lambda name, value: (name, value.shape))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.delitem(sys.modules, "fi_runtime.frontend.drain", raising=False)
    from fi_runtime.frontend import drain

    monkeypatch.setattr(drain, "ASK_S", 0.01)
    yield drain
    sys.modules.pop("fi_runtime.frontend.drain", None)


@pytest.mark.parametrize("end", ["Server not ready", "model 'llm' is not ready"])
def test_each_question_is_told_and_the_last_one_is_not_missed(drain: Any, end: str) -> None:
    said: list[Any] = []
    answers = iter(["unexpected input", "unexpected input", end])
    closing = threading.Event()

    def why_refused(tensors: list[Any]) -> str:
        said.append("asked")
        return next(answers)

    watched = drain.Drain(why_refused, 1, os.getppid(), closing, said.append)
    thread = threading.Thread(target=watched.watch, daemon=True)
    thread.start()
    closing.wait(0.1)
    assert said == [], "nothing before there was a request"
    watched.has_served()
    closing.wait(0.5)
    assert said == [False, "asked"] * 3 + [True]
    closing.set()
    thread.join(10)
    assert not thread.is_alive()
