"""Triton's own queue holds what the engine has no room for, and its policies mean what they say."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from fi_runtime.engine.credits import Credits
from tests.serving import (
    HANG_S,
    KNOBS,
    STREAMED,
    Reference,
    Stream,
    engines,
    grpc_client,
    is_free,
    is_idle,
    joined,
    metric,
    tensors_of,
    wait_until,
)
from tools.repository import copy_door
from tools.serve import TritonServer

POLICY = """
dynamic_batching {
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy {
    max_queue_size: 8
    default_timeout_microseconds: 60000000
    allow_timeout_override: true
  }
  priority_queue_policy {
    key: 3
    value { timeout_action: REJECT default_timeout_microseconds: 1000000 }
  }
}
"""
HASTY_PRIORITY, HASTY_S = 3, 1.0
"""requests that wait no longer, though they do not say so themselves"""
HELD = Credits.STANDBY + 1
"""Requests past the queue: what the engine takes at once, and the one that `execute` waits with."""
LONG = {"text_input": "holds the engine", "max_tokens": 3000, "temperature": 0.0, "stream": True}
SHORT = {"text_input": "short", "max_tokens": 5, "temperature": 0.0, "stream": True}


@pytest.fixture(scope="module")
def narrow(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server that runs one sequence at a time, from one front end, one request a batch."""
    folder = tmp_path_factory.mktemp("narrow")
    knobs = {**KNOBS, "checkpoint": str(served_checkpoint), "max_sequences": "1"}
    door = copy_door(STREAMED, folder / "repository" / STREAMED, knobs, instances=1)
    config = (door / "config.pbtxt").read_text()
    assert "dynamic_batching {}" in config
    config = config.replace("dynamic_batching {}", POLICY)
    config = config.replace("max_batch_size: 8", "max_batch_size: 1")
    (door / "config.pbtxt").write_text(config)
    with TritonServer(folder / "repository", log=folder / "log") as running:
        running.wait_ready()
        yield running


def await_news(streams: list[Stream]) -> None:
    wait_until(lambda: any(one.has_news for one in streams), HANG_S, "one of them is answered")


def in_engine(server: TritonServer) -> float:
    """Sequences that run or wait there; it says so once a second."""
    return sum(metric(server, f"vllm:num_requests_{state}") for state in ("running", "waiting"))


class Load:
    """Streams that hold the engine, and all that it takes beside them; closed at the end."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self.holding = [Stream(server, **LONG) for _ in range(HELD)]
        # Any of them comes first: each has a connection of its own.
        await_news(self.holding)
        wait_until(
            lambda: in_engine(server) == Credits.STANDBY, HANG_S, "the engine takes its share"
        )
        time.sleep(0.3)  # the last of them has left Triton's queue by then

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.holding:
            stream.close()
        [engine] = engines(self._server)
        wait_until(lambda: is_idle(engine), 20, "the engine is idle")


def queued(server: TritonServer, tokens: int = 5, **options: Any) -> "Queued":
    return Queued(server, {**SHORT, "max_tokens": tokens}, options)


class Queued:
    """A request with options of Triton's own, as priority and timeout in microseconds."""

    def __init__(
        self, server: TritonServer, request: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._client = grpc_client(server)
        self.came: list[tuple[float, Any]] = []
        self._client.start_stream(lambda result, error: self._take(error or result))
        inputs = tensors_of(tritonclient.grpc, request)
        self._client.async_stream_infer(
            STREAMED, inputs, enable_empty_final_response=True, **options
        )

    def _take(self, result: Any) -> None:
        self.came.append((time.monotonic(), result))

    @property
    def error(self) -> str:
        failures = [r for _, r in self.came if isinstance(r, InferenceServerException)]
        return str(failures[0]) if failures else ""

    @property
    def is_answered(self) -> bool:
        return bool(self.came) and not self.error and self._is_last(self.came[-1][1])

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=not self.is_answered and not self.error)
        self._client.close()

    @staticmethod
    def _is_last(result: Any) -> bool:
        return bool(result.get_response().parameters["triton_final_response"].bool_param)


def test_a_queue_that_is_full_refuses_at_once(narrow: TritonServer) -> None:
    with Load(narrow):
        waiting = [queued(narrow) for _ in range(8)]
        time.sleep(0.3)
        assert not any(request.came for request in waiting), "they wait in Triton's queue"
        begin = time.monotonic()
        refused = queued(narrow)
        wait_until(lambda: bool(refused.error), 5, "the ninth is refused")
        assert time.monotonic() - begin < 2
        assert "Exceeds maximum queue size" in refused.error
        for request in (*waiting, refused):
            request.close()


def test_a_request_that_waits_longer_than_its_timeout_is_refused(narrow: TritonServer) -> None:
    with Load(narrow) as load:
        patient, hasty = queued(narrow), queued(narrow, timeout=300_000)
        other = queued(narrow)
        wait_until(lambda: bool(hasty.error), 5, "the hasty one is refused")
        assert "timeout expired" in hasty.error.lower()
        assert not patient.came
        for stream in load.holding:
            stream.close()
        wait_until(lambda: patient.is_answered and other.is_answered, 20, "the others are answered")
        for request in (patient, hasty, other):
            request.close()


def test_the_queues_own_timeout_refuses_what_waits_longer(narrow: TritonServer) -> None:
    with Load(narrow) as load:
        begin = time.monotonic()
        late = queued(narrow, priority=HASTY_PRIORITY)
        wait_until(lambda: bool(late.error), 5, "the late one is refused")
        assert late.came[0][0] - begin >= HASTY_S
        assert "timeout expired" in late.error.lower()
        early = queued(narrow, priority=HASTY_PRIORITY)
        time.sleep(HASTY_S / 4)
        assert not early.came, "it waits in Triton's queue, too"
        for stream in load.holding:
            stream.close()
        wait_until(lambda: early.is_answered, 20, "the early one is answered")
        for request in (late, early):
            request.close()


def test_a_higher_priority_is_served_before_those_that_came_earlier(narrow: TritonServer) -> None:
    tokens = 200  # for longer than a busy machine may keep an answer from its reader
    with Load(narrow) as load:
        low = [queued(narrow, tokens, priority=2) for _ in range(2)]
        time.sleep(0.2)
        high = queued(narrow, tokens, priority=1)
        time.sleep(0.2)
        for stream in load.holding:
            stream.close()
        requests = [*low, high]
        wait_until(lambda: all(r.is_answered for r in requests), 60, "all are answered")
        first = {request: request.came[0][0] for request in requests}
        assert first[high] < min(first[request] for request in low)
        for request in requests:
            request.close()


def test_after_a_storm_of_cancellations_everything_is_as_before(
    narrow: TritonServer, reference: Reference
) -> None:
    """1,000 requests that are cancelled, in the queue, in the engine and while they stream."""
    cancelled = 0
    for number in itertools.count():
        if cancelled >= 1000:
            break
        streams = [Stream(narrow, **LONG) for _ in range(HELD + 3)]
        if number % 3 == 0:
            await_news(streams)  # be it that the queue is full of others
        for stream in streams:
            stream.close()
        cancelled += len(streams)
    [engine] = engines(narrow)
    wait_until(lambda: is_idle(engine), 30, "the engine is idle")
    wait_until(lambda: is_free(narrow), 10, "no request has a page")
    for _ in range(HELD + 3):  # more than there are credits: none was lost
        with Stream(narrow, **SHORT) as stream:
            assert joined(list(stream)) == reference.text("short", 5)
    at_once = [Stream(narrow, **SHORT) for _ in range(HELD + 3)]
    for stream in at_once:
        assert joined(list(stream)) == reference.text("short", 5)
        stream.close()
