"""What /metrics says, against what clients know that they asked for and got."""

import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import (
    KNOBS,
    STREAMED,
    UNARY,
    Reference,
    Stream,
    at_once,
    infer_grpc,
    joined,
    stream,
    wait_until,
)
from tools.repository import write_repository
from tools.serve import TritonServer

LINE = re.compile(r"^(vllm:\w+)\{(.*?)\} (\S+)$", re.MULTILINE)
Values = dict[tuple[str, str], float]


def read(server: TritonServer) -> Values:
    """Every metric of ours by name and model; of a histogram's buckets, ``name_bucket le``."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text = response.read().decode()
    values: Values = {}
    for name, labels, value in LINE.findall(text):
        given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert given["version"] == "1"
        key = f"{name} {given['le']}" if "le" in given else name
        assert (key, given["model"]) not in values, "one metric, however many front ends"
        values[key, given["model"]] = float(value)
    return values


def settled(server: TritonServer) -> Values:
    """The values once nothing that was done before is still to be reported."""
    before = read(server)
    while True:
        time.sleep(1.5)  # three times what a front end takes to report
        after = read(server)
        if after == before:
            return after
        before = after


@pytest.fixture(scope="module")
def small(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server whose cache is too small for what is asked of it at once."""
    folder = tmp_path_factory.mktemp("small")
    knobs = {**KNOBS, "cache_tokens": "512", "max_context": "256"}
    repository = write_repository(folder / "repository", served_checkpoint, knobs)
    with TritonServer(repository, log=folder / "log") as running:
        running.wait_ready()
        yield running


def test_requests_are_counted_once_whatever_front_end_took_them(server: TritonServer) -> None:
    before = settled(server)
    inputs = {"text_input": "twelve bytes", "max_tokens": 17, "temperature": 0.0}
    calls = [lambda: len(stream(server, **inputs)) for _ in range(10)]
    calls += [lambda: len(infer_grpc(server, **inputs).text) for _ in range(5)]
    at_once(calls)
    knobs = '{"n": 3, "max_tokens": 5}'
    infer_grpc(server, text_input="n", sampling_parameters=knobs)

    def grown(name: str, model: str) -> float:
        return read(server)[f"vllm:{name}", model] - before.get((f"vllm:{name}", model), 0.0)

    wait_until(lambda: grown("request_params_n_count", UNARY) == 6, 10, "all are reported")
    wait_until(lambda: grown("request_params_n_count", STREAMED) == 10, 10, "all are reported")
    assert grown("prompt_tokens_total", STREAMED) == 10 * 12
    assert grown("generation_tokens_total", STREAMED) == 10 * 17
    assert grown("prompt_tokens_total", UNARY) == 5 * 12 + 1
    assert grown("generation_tokens_total", UNARY) == 5 * 17 + 3 * 5
    for name, total in {"prompt": 120, "generation": 170}.items():
        assert grown(f"request_{name}_tokens_count", STREAMED) == 10
        assert grown(f"request_{name}_tokens_sum", STREAMED) == total
        assert grown(f"request_{name}_tokens_bucket 10", STREAMED) == 0
        assert grown(f"request_{name}_tokens_bucket 20", STREAMED) == 10
    assert grown("request_params_n_bucket 1", UNARY) == 5
    assert grown("request_params_n_sum", UNARY) == 5 + 3


def test_times_are_those_that_a_client_measures(server: TritonServer) -> None:
    before = settled(server)
    begin = time.monotonic()
    tokens = 200
    with Stream(server, text_input="timed", stream=True, max_tokens=tokens) as opened:
        opened.next()
        first_s = time.monotonic() - begin
        list(opened)
    whole_s = time.monotonic() - begin

    def grown(name: str) -> float:
        key = (f"vllm:{name}", STREAMED)
        return read(server)[key] - before.get(key, 0.0)

    wait_until(lambda: grown("e2e_request_latency_seconds_count") == 1, 10, "it is reported")
    first = grown("time_to_first_token_seconds_sum")
    whole = grown("e2e_request_latency_seconds_sum")
    # The client's clock also runs while it connects, and while a busy machine keeps it waiting.
    assert 0 < first <= first_s
    assert max(first, 0.3 * whole_s) < whole <= whole_s
    per_token = grown("time_per_output_token_seconds_sum")
    assert per_token == pytest.approx((whole - first) / (tokens - 1), rel=0.2)


def test_the_engines_numbers_follow_its_load(small: TritonServer) -> None:
    def value(name: str) -> float:
        return read(small)[f"vllm:{name}", STREAMED]

    inputs = {"text_input": "x" * 40, "max_tokens": 200, "temperature": 0.0, "stream": True}
    streams = [Stream(small, **inputs) for _ in range(32)]
    try:
        wait_until(lambda: value("num_requests_running") >= 2, 10, "some run")
        wait_until(lambda: value("num_requests_waiting") >= 1, 20, "and some wait")
        assert 0.3 < value("kv_cache_usage_perc") <= 1.0
        texts = {joined(list(opened)) for opened in streams}
    finally:
        for opened in streams:
            opened.close()
    assert len(texts) == 1
    wait_until(lambda: value("num_requests_running") == 0, 10, "none runs any more")
    assert value("num_requests_waiting") == 0
    assert value("kv_cache_usage_perc") == 0
    assert value("num_preemptions_total") >= 1, "they did not fit"


def test_the_share_of_prompts_that_was_in_the_cache(server: TritonServer) -> None:
    text = "a beginning that many prompts have, so that it is computed once and then read " * 2

    def grown(name: str) -> float:
        key = (f"vllm:prefix_cache_{name}_total", STREAMED)
        return settled(server)[key] - before[key]

    before = settled(server)
    stream(server, text_input=text + "1", max_tokens=1)
    assert (grown("queries"), grown("hits")) == (len(text) + 1, 0)
    stream(server, text_input=text + "2", max_tokens=1)
    page_size = int(KNOBS.get("page_size", 16))
    assert grown("queries") == 2 * (len(text) + 1)
    assert grown("hits") == len(text) // page_size * page_size


def test_a_request_that_failed_is_not_counted_as_answered(server: TritonServer) -> None:
    before = settled(server)
    with Stream(server, text_input="left", stream=True, max_tokens=3000) as opened:
        opened.next()
    after = settled(server)
    key = ("vllm:e2e_request_latency_seconds_count", STREAMED)
    assert after[key] == before[key]
    tokens = ("vllm:generation_tokens_total", STREAMED)
    assert 1 <= after[tokens] - before[tokens] < 3000, "what was computed all the same is"
