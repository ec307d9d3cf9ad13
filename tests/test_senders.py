"""Who sends what the engine gave, and in which order."""

import random
import threading
import time

import pytest

from fi_runtime.frontend.senders import Sender
from fi_runtime.messages import Output


class Requests:
    """Requests by number: those with tokens that no response has been sent for yet."""

    def __init__(self) -> None:
        self.new: dict[int, list[int]] = {}
        self.sent: list[tuple[int, list[int], str]] = []
        """number, tokens, and the thread that sent them"""
        self.pause_s = 0.0
        self.hold = threading.Event()
        self.hold.set()

    def take(self, output: Output) -> int | None:
        if not output.tokens:  # as of one that has ended
            return None
        self.new.setdefault(output.request, []).extend(output.tokens)
        return output.request

    def respond(self, number: int) -> None:
        self.hold.wait(10)
        time.sleep(self.pause_s)
        if tokens := self.new.pop(number, []):
            self.sent.append((number, tokens, threading.current_thread().name))


@pytest.fixture
def requests() -> Requests:
    return Requests()


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_sent_once_and_in_order_whoever_sends_them(
    requests: Requests, seed: int
) -> None:
    rng = random.Random(seed)
    sender = Sender(requests.take, requests.respond)
    given: dict[int, list[int]] = {}
    for token in range(2000):
        requests.pause_s = rng.choice((0.0, 0.0, 0.0002))
        numbers = rng.sample(range(8), rng.choice((1, 1, 1, 3)))
        for number in numbers:
            given.setdefault(number, []).append(token)
        sender.give([Output(number, [token]) for number in numbers], alone=len(numbers) == 1)
        if rng.random() < 0.2:
            time.sleep(0.0005)
    sender.close()
    sender.thread.join(10)
    assert not sender.thread.is_alive()
    said: dict[int, list[int]] = {}
    for number, tokens, _ in requests.sent:
        said.setdefault(number, []).extend(tokens)
    assert said == given
    assert len({thread for *_, thread in requests.sent}) == 2


def test_what_comes_alone_is_sent_by_who_brings_it_unless_the_thread_is_busy(
    requests: Requests,
) -> None:
    sender = Sender(requests.take, requests.respond)
    own = threading.current_thread().name
    sender.give([Output(1, [10])], alone=True)
    assert requests.sent == [(1, [10], own)]
    requests.hold.clear()
    sender.give([Output(1, [11]), Output(2, [20])], alone=False)
    sender.give([Output(1, [12])], alone=True)  # does not wait for the response that is held
    requests.hold.set()
    sender.close()
    sender.thread.join(10)
    tokens = [(number, tokens) for number, tokens, _ in requests.sent[1:]]
    assert [token for number, some in tokens for token in some if number == 1] == [11, 12]
    assert (2, [20]) in tokens
    assert {thread for *_, thread in requests.sent[1:]} == {"replies"}


def test_what_waits_for_a_response_is_sent_in_one(requests: Requests) -> None:
    sender = Sender(requests.take, requests.respond)
    requests.hold.clear()
    sender.give([Output(1, [0])], alone=False)
    while not sender._queue.empty():
        time.sleep(0.001)
    for token in range(1, 5):
        sender.give([Output(1, [token]), Output(2, [])], alone=False)
    requests.hold.set()
    sender.close()
    sender.thread.join(10)
    # The first may have been held before its tokens were taken out, or after.
    assert [token for _, tokens, _ in requests.sent for token in tokens] == list(range(5))
    assert len(requests.sent) <= 2
