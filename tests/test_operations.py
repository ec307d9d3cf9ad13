"""What an operator looks at: the dashboard, the log of requests, traces."""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc

from tests.serving import (
    HANG_S,
    KNOBS,
    STREAMED,
    UNARY,
    Reference,
    grpc_client,
    post,
    stream,
    tensors_of,
    wait_until,
)
from tools.repository import copy_door
from tools.serve import ROOT, TritonServer

# The dashboard and the page on metrics

OURS = re.compile(r"(?:vllm|fi_runtime):\w+")
METRIC = re.compile(r"\b(?:vllm:|fi_runtime:|nv_)\w+")
SERIES = re.compile(r"^(\S+?)\{(.*)\} \S+$", re.MULTILINE)


@pytest.fixture(scope="module")
def series(server: TritonServer) -> dict[str, set[str]]:
    """Each metric that a server reports after a request, and the names of its labels."""
    stream(server, text_input="a", max_tokens=2)
    time.sleep(1.5)
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text = response.read().decode()
    found: dict[str, set[str]] = {}
    for name, labels in SERIES.findall(text):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def family(name: str) -> str:
    """A histogram's name for those of its series."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def test_the_dashboard_asks_for_metrics_that_are_there(series: dict[str, set[str]]) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [one["query"]["query"] for one in dashboard["templating"]["list"][1:]]
    asked = {name for expression in expressions for name in METRIC.findall(expression)}
    assert asked - series.keys() == set()
    ours = {name for name in series if OURS.fullmatch(name)}
    assert len(ours) > 10
    assert {family(name) for name in ours} - {family(name) for name in asked} == set()
    for expression in expressions:
        [name, *_] = METRIC.findall(expression)
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= series[name], expression
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_the_page_on_metrics_names_all_of_them_and_no_other(series: dict[str, set[str]]) -> None:
    page = (ROOT / "docs" / "OPERATIONS.md").read_text()
    named = {family(name) for name in OURS.findall(page)}
    assert named == {family(name) for name in series if OURS.fullmatch(name)}


# The log of requests, and traces


class Collector:
    """Takes what an OpenTelemetry exporter sends to its URL."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in body["resourceSpans"]:
                    for scope in resource["scopeSpans"]:
                        collector.spans += scope["spans"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with contextlib.closing(Collector()) as running:
        yield running


@pytest.fixture(scope="module")
def observed(
    reference: Reference,
    served_checkpoint: Path,
    collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TritonServer]:
    """A server that logs each request, and sends a trace of each."""
    folder = tmp_path_factory.mktemp("observed")
    knobs = {"checkpoint": str(served_checkpoint), **KNOBS, "log_requests": "true"}
    copy_door(STREAMED, folder / "repository" / STREAMED, knobs, instances=1)
    unary = {"engine": STREAMED, "log_requests": "true"}
    copy_door(UNARY, folder / "repository" / UNARY, unary, instances=1)
    settings = [
        "mode=opentelemetry",
        "rate=1",
        "level=TIMESTAMPS",
        f"opentelemetry,url={collector.url}",
        "opentelemetry,bsp_schedule_delay=200",
    ]
    arguments = [f"--trace-config={setting}" for setting in settings]
    with TritonServer(folder / "repository", arguments, log=folder / "log") as running:
        running.wait_ready()
        yield running


def logged(server: TritonServer, count: int) -> list[dict[str, Any]]:
    """The lines of the last requests, once there are so many."""
    assert server.log is not None
    lines: list[dict[str, Any]] = []

    def there() -> bool:
        assert server.log is not None
        text = server.log.read_text()
        lines[:] = map(json.loads, re.findall(r"^.*? INFO request (\{.*\})$", text, re.MULTILINE))
        return len(lines) >= count

    wait_until(there, 10, f"{count} requests are logged")
    return lines


def test_each_request_is_a_line_in_the_log(observed: TritonServer) -> None:
    with contextlib.closing(grpc_client(observed)) as client:

        def ask(door: str, request_id: str, **inputs: Any) -> float:
            begin = time.monotonic()
            tensors = tensors_of(tritonclient.grpc, inputs)
            client.infer(door, tensors, request_id=request_id, client_timeout=HANG_S)
            return time.monotonic() - begin

        knobs = '{"n": 2, "max_tokens": 30}'
        took = ask(UNARY, "two answers", text_input="12345678", sampling_parameters=knobs)
        with pytest.raises(tritonclient.grpc.InferenceServerException):
            ask(UNARY, "refused", text_input="a secret", max_tokens=0)
        left = {"text_input": "a", "max_tokens": 3000}
        with pytest.raises(tritonclient.grpc.InferenceServerException):
            client.infer(UNARY, tensors_of(tritonclient.grpc, left), client_timeout=0.5)
    body = {"id": "one more", "text_input": "abc", "max_tokens": 5}
    with post(observed, f"/v2/models/{STREAMED}/generate", body) as response:
        assert response.status == 200
        response.read()
    answered, refused, *rest = logged(observed, 4)
    assert 0 < answered.pop("first_token_s") < answered.pop("total_s") <= took
    assert answered == {
        "id": "two answers",
        "end": "answered",
        "prompt_tokens": 8,
        "answers": 2,
        "tokens": 60,
    }
    assert 0 <= refused.pop("total_s") < 5
    assert refused == {"id": "refused", "end": "INVALID_ARG"}
    by_end = {one["end"]: one for one in rest}
    assert by_end["answered"]["id"] == "one more"
    assert by_end["answered"]["tokens"] == 5
    assert by_end["CANCELLED"]["id"] == ""
    assert 0 < by_end["CANCELLED"]["tokens"] < 3000
    assert observed.log is not None
    assert "a secret" not in observed.log.read_text()


def test_an_id_cannot_forge_a_line(observed: TritonServer) -> None:
    before = len(logged(observed, 0))
    forged = 'x"}\n2026-01-01 00:00:00 llm INFO request {"id": "forged", "end": "answered"}'
    with contextlib.closing(grpc_client(observed)) as client:
        tensors = tensors_of(tritonclient.grpc, {"text_input": "a", "max_tokens": 1})
        client.infer(UNARY, tensors, request_id=forged)
    assert [one["id"] for one in logged(observed, before + 1)[before:]] == [forged]


def test_a_trace_is_part_of_its_clients_trace(observed: TritonServer, collector: Collector) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"id": "traced", "text_input": "abc", "max_tokens": 50, "stream": True}
    request = urllib.request.Request(
        f"{observed.http_url}/v2/models/{STREAMED}/generate_stream",
        json.dumps(body).encode(),
        {"traceparent": f"00-{trace}-{parent}-01"},
    )
    begin = time.monotonic()
    with urllib.request.urlopen(request, timeout=HANG_S) as response:
        response.read()
    took_s = time.monotonic() - begin

    def spans() -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in collector.spans if one["traceId"] == trace}

    wait_until(lambda: len(spans()) == 3, 20, "the spans are sent")
    whole = spans()["InferRequest"]
    assert whole["parentSpanId"] == parent
    lasted_s = (int(whole["endTimeUnixNano"]) - int(whole["startTimeUnixNano"])) / 1e9
    assert 0.5 * took_s < lasted_s <= took_s
    attributes = {one["key"]: one["value"] for one in spans()[STREAMED]["attributes"]}
    assert attributes["triton.request_id"] == {"stringValue": "traced"}
    assert {"REQUEST_START", "QUEUE_START"} <= {
        event["name"] for event in spans()[STREAMED]["events"]
    }
