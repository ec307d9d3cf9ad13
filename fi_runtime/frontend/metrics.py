"""What Triton's /metrics says of a door, under vLLM's names so that dashboards carry over.

Each value costs a round trip to the server. So the threads that serve only note what happened, and
one of its own reports it, a few times a second.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton_python_backend_utils as pb

from fi_runtime.messages import Stats

log = logging.getLogger(__name__)

REPORT_S = 0.5
OWN = "fi_runtime"
"""prefix of what vLLM has no name for"""

TIME_TO_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
)
TIME_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
LATENCY = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
ANSWERS = (1, 2, 5, 10, 20)


@dataclass
class RequestTimes:
    """When a request came and what it got. Times are of ``time.monotonic``, in seconds."""

    arrived: float
    prompt_tokens: int
    answers: int
    first_token: float = 0.0
    tokens: int = 0


class Metrics:
    """Reports what it is told of.

    Args:
        labels: of this door: model and version.
        engine_labels: of the model whose engine it uses. Of all its front ends, the one that the
            engine tells its numbers reports them.
        max_context: tokens that a request can have at most.
    """

    def __init__(
        self, labels: dict[str, str], engine_labels: dict[str, str], max_context: int
    ) -> None:
        # Each only ever grows: the reporting thread needs no lock, those that add to it do.
        self._prompted = self._generated = 0
        self._lock = threading.Lock()
        self._notes: deque[Callable[[], None]] = deque()
        self._closing = threading.Event()
        self._families: list[Any] = []  # a metric needs its family for as long as it lives
        counter, gauge = pb.MetricFamily.COUNTER, pb.MetricFamily.GAUGE
        of_door = partial(self._metric, labels=labels)
        of_engine = partial(self._metric, labels=engine_labels)

        def histogram(name: str, description: str, buckets: Iterable[float]) -> Any:
            return of_door(name, description, pb.MetricFamily.HISTOGRAM, buckets=list(buckets))

        self._prompt_tokens = of_door("prompt_tokens_total", "Prompt tokens computed", counter)
        self._tokens = of_door("generation_tokens_total", "Tokens generated", counter)
        self._first = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", TIME_TO_FIRST_TOKEN
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Between tokens, each request's mean", TIME_PER_TOKEN
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From arrival to the last response", LATENCY
        )
        counts = list(_one_two_five(max_context))
        self._prompts = histogram("request_prompt_tokens", "Tokens of each prompt", counts)
        self._outputs = histogram("request_generation_tokens", "Tokens of each answer", counts)
        self._n = histogram("request_params_n", "Answers asked for", ANSWERS)
        self._running = of_engine("num_requests_running", "Sequences that run", gauge)
        self._waiting = of_engine(
            "num_requests_waiting", "Sequences that wait in the engine", gauge
        )
        self._usage = of_engine("kv_cache_usage_perc", "Share of the cache in use, 0 to 1", gauge)
        self._preemptions = of_engine("num_preemptions_total", "Sequences set back", counter)
        self._queries = of_engine(
            "prefix_cache_queries_total", "Prompt tokens looked up in the cache", counter
        )
        self._hits = of_engine("prefix_cache_hits_total", "Prompt tokens found there", counter)
        self._up = of_engine("engine_up", "1 while the engine lives, else 0", gauge, OWN)
        self._starts = of_engine("engine_starts_total", "Engines that began to serve", counter, OWN)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def took(self, times: RequestTimes, tokens: int) -> None:
        """Tokens of a request came."""
        with self._lock:
            if tokens and not times.tokens:
                times.first_token = time.monotonic()
                self._prompted += times.prompt_tokens
            times.tokens += tokens
            self._generated += tokens

    def finished(self, times: RequestTimes) -> None:
        """A request got its last response."""
        now = time.monotonic()
        self._notes.append(lambda: self._report(times, now))

    def engine(self, stats: Stats) -> None:
        """The engine said how it is."""
        self._notes.append(lambda: self._report_engine(stats))

    def engine_up(self, started: bool) -> None:
        """There is an engine; ``started``: by this front end."""
        self._notes.append(lambda: self._report_up(started))

    def engine_died(self) -> None:
        """There is none, and so nothing in it.

        RACE: where another front end has found the next one already, the values are wrong until
        this front end finds it, too.
        """
        self._notes.append(self._report_death)

    def close(self) -> None:
        """Report what is left, and end."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        prompted = generated = 0
        closing = False
        while not closing:
            closing = self._closing.wait(REPORT_S)
            try:
                new = self._prompted - prompted, self._generated - generated
                prompted, generated = prompted + new[0], generated + new[1]
                if any(new):
                    self._prompt_tokens.increment(new[0])
                    self._tokens.increment(new[1])
                while self._notes:
                    self._notes.popleft()()
            except Exception:
                log.exception("a metric could not be reported")

    def _report(self, times: RequestTimes, now: float) -> None:
        self._prompts.observe(times.prompt_tokens)
        self._n.observe(times.answers)
        self._outputs.observe(times.tokens)
        self._latency.observe(now - times.arrived)
        self._first.observe(times.first_token - times.arrived)
        gaps = times.tokens - times.answers
        if gaps > 0:
            # Answers side by side: each has gaps of its own.
            self._per_token.observe((now - times.first_token) * times.answers / gaps)

    def _report_engine(self, stats: Stats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._usage.set(stats.cache_usage)
        if stats.preemptions:
            self._preemptions.increment(stats.preemptions)
        if stats.prompt_tokens:
            self._queries.increment(stats.prompt_tokens)
        if stats.reused_tokens:
            self._hits.increment(stats.reused_tokens)

    def _report_up(self, started: bool) -> None:
        self._up.set(1)
        if started:
            self._starts.increment(1)

    def _report_death(self) -> None:
        for gauge in (self._up, self._running, self._waiting, self._usage):
            gauge.set(0)

    def _metric(
        self, name: str, description: str, kind: Any, prefix: str = "vllm", **options: Any
    ) -> Any:
        family = pb.MetricFamily(name=f"{prefix}:{name}", description=description, kind=kind)
        self._families.append(family)
        return family.Metric(**options)


def _one_two_five(most: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 ... up to ``most``."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > most:
                return
            yield factor * power
        power *= 10
