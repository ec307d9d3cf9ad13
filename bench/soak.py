"""Mixed traffic with cancellations and faults, for as long as asked: what goes wrong.

    python -m bench.soak [--minutes 30] [--kernels FOLDER] [--out soak.json]

Clients ask both doors over every transport: streams and whole answers, several to a prompt, guides,
stop strings, log-probabilities, short prompts and long ones. Some leave in mid-answer. Meanwhile
the engine is killed, or stopped for a moment, and front ends are killed. Each answer is compared
with the one that the server gave to the same request before, when that was all it had to do.

Beside ``llm`` and ``llm_unary`` there is a third door, whose front ends are those that are killed:
tritonserver 2.51 never ends what a dead front end has not answered, so its clients use gRPC, which
can give a request up, and the door is loaded again.

The exit code is 1 where an answer is wrong, a request is lost, a page is not given back, or memory
has grown by more than 2 %. A request is lost that has no end in time, or an error where nothing
that was done to the server explains it.
"""

import contextlib
import http.client
import itertools
import json
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import tritonclient.grpc as triton
import typer
from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from bench.options import Kernels, Out
from bench.results import write_results
from client.tensors import to_tensors
from tools.demo.tasks import evaluation_set
from tools.repository import SHIPPED, STREAMED, UNARY, copy_door, write_repository
from tools.serve import TritonServer

MORTAL = "llm_mortal"
"""the door whose front ends are killed"""
LAST_LINES = 100
"""of the server's log, shown when a soak fails"""
DOORS = (STREAMED, UNARY, MORTAL)
CHECKPOINT = SHIPPED / STREAMED / "demo_checkpoint"
ARGUMENTS = ["--model-control-mode=explicit", "--load-model=*"]
KNOBS = {"cache_tokens": 4096, "max_sequences": 16, "step_timeout_s": 20}
"""a cache that is full soon, so that memory is flat from then on and sequences give way"""
PAGE_SIZE = 16
TIMEOUT_S = 60.0
"""for any request: one that has no end by then is lost"""
GIVE_UP_S = 20.0
"""the same at the door whose front ends are killed, where clients may wait in vain"""
AGAIN_S = 60.0
"""for the server to answer after a fault"""
HELD_S = 2.0
"""how long an engine is stopped, from which it goes on"""
REPORTED_S = 2.0
"""how old metrics may be"""
HUNG_S = TIMEOUT_S + 15.0
"""for a client's last request to end, its client's own part included"""
PAUSE_S = 0.2
"""of a client that was refused"""
LEAVE_SHARE = 0.1
"""of the requests, those whose client leaves in mid-answer"""
GROWTH = 0.02
"""of memory that is no leak"""
LOGPROB_TOLERANCE = 0.2
"""between an answer alone and beside others; bfloat16 on a GPU is what needs so much"""
OTHER_SEEDS = 5


# Requests and answers


@dataclass(frozen=True)
class Case:
    """A request whose answer is always the same."""

    prompt: str
    sampling: Mapping[str, Any]
    """sampling_parameters, in vLLM's names"""

    def inputs(self, stream: bool) -> dict[str, str | bool]:
        """The model's inputs by name, one element each."""
        return {
            "text_input": self.prompt,
            "sampling_parameters": json.dumps(self.sampling),
            "stream": stream,
            "exclude_input_in_output": True,
            "return_finish_reason": True,
            "return_logprobs": "logprobs" in self.sampling,
        }


@dataclass
class Answer:
    """What came for each of a request's answers, in the responses so far."""

    texts: list[str] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """of the chosen tokens of the first one"""

    def add(self, outputs: Mapping[str, Any]) -> None:
        """One response, whose outputs have an element for each answer, or are that element."""
        texts, finishes = (_elements(outputs[name]) for name in ("text_output", "finish_reason"))
        before = self.texts or [""] * len(texts)
        self.texts = [old + new for old, new in zip(before, texts, strict=True)]
        self.finishes = finishes
        if "logprobs" in outputs:
            tokens = json.loads(_elements(outputs["logprobs"])[0]) or []
            self.logprobs += [next(iter(token.values()))["logprob"] for token in tokens]

    def is_like(self, other: "Answer") -> bool:
        """Whether it says the same; log-probabilities may differ by rounding."""
        return (
            (self.texts, self.finishes) == (other.texts, other.finishes)
            and len(self.logprobs) == len(other.logprobs)
            and all(
                abs(mine - its) < LOGPROB_TOLERANCE
                for mine, its in zip(self.logprobs, other.logprobs, strict=True)
            )
        )


def _elements(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def cases() -> list[Case]:
    """Of every kind of traffic, several."""
    greedy = {"temperature": 0.0, "max_tokens": 100}

    def prompts(task: Any, count: int, tokens: int = 256) -> list[str]:
        return [one.prompt for one in evaluation_set(task, count, seed=7, tokens=tokens)]

    plain = [
        *prompts("add", 4),
        *prompts("copy", 4),
        *prompts("reverse", 4),
        *prompts("story", 4),
        *prompts("recall", 4),
        *prompts("recall", 3, tokens=1900),
    ]
    made = [Case(prompt, greedy) for prompt in plain]
    seeded = {"temperature": 0.8, "max_tokens": 60, "top_p": 0.95}
    for seed, prompt in enumerate([*prompts("story", 2), *prompts("add", 2), *prompts("copy", 2)]):
        made.append(Case(prompt, {**seeded, "seed": seed}))
        made.append(Case(prompt, {**seeded, "seed": seed, "n": 3}))
    made += [Case(prompt, {**greedy, "stop": ["."]}) for prompt in prompts("story", 2)]
    made += [Case(prompt, {**greedy, "logprobs": 2}) for prompt in plain[::5]]
    guides: list[dict[str, Any]] = [
        {"regex": "[0-9]{2,4}"},
        {"choice": ["17", "170", "1700"]},
        {"json": {"type": "object", "properties": {"sum": {"type": "integer"}, "ok": {}}}},
    ]
    for guide in guides:
        sampling = {**greedy, "max_tokens": 40, "structured_outputs": guide}
        made += [Case(prompt, sampling) for prompt in prompts("add", 2)]
    return made


LEFT = Case("Once upon a time", {"temperature": 0.0, "max_tokens": 1500, "ignore_eos": True})
"""for clients that leave: far from its end when they do"""


# Asking


class Refused(Exception):
    """An error that came instead of the answer, or of the rest of it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        # Errors on gRPC streams, and of /generate, come without their code.
        self.code = "UNAVAILABLE" if "the engine died" in message else code


class Client:
    """Asks over every transport, one request at a time."""

    def __init__(self, server: TritonServer) -> None:
        self._address = server.address("http")
        # A list of channel arguments, even an empty one, keeps the channel from being shared.
        self._grpc = triton.InferenceServerClient(server.grpc_url, channel_args=[])

    def close(self) -> None:
        self._grpc.close()

    def infer_grpc(self, case: Case, door: str) -> Answer:
        inputs = to_tensors(case.inputs(stream=False), triton.InferInput)
        with _refusals():
            timeout_s = GIVE_UP_S if door == MORTAL else TIMEOUT_S
            result = self._grpc.infer(door, inputs, client_timeout=timeout_s)
        answer = Answer()
        answer.add(_outputs(result))
        return answer

    def stream_grpc(self, case: Case, door: str, leave_after: int | None = None) -> Answer:
        """``leave_after``: responses after which the request is cancelled."""
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        end = time.monotonic() + TIMEOUT_S
        answer, over = Answer(), False
        self._grpc.start_stream(lambda result, error: came.put(error or result))
        try:
            with _refusals():
                tensors = to_tensors(case.inputs(stream=True), triton.InferInput)
                self._grpc.async_stream_infer(door, tensors, enable_empty_final_response=True)
                for taken in itertools.count():
                    if over or taken == leave_after:
                        return answer
                    try:
                        result = came.get(timeout=max(0.0, end - time.monotonic()))
                    except queue.Empty:
                        raise Refused("TIMEOUT", f"no end in {TIMEOUT_S:.0f} s") from None
                    if isinstance(result, Exception):
                        over = True
                        raise result
                    over = result.get_response().parameters["triton_final_response"].bool_param
                    answer.add(_outputs(result))
        finally:
            # Where a cancel meets the end of its stream, tritonserver 2.51 keeps the request.
            self._grpc.stop_stream(cancel_requests=not over)
        raise AssertionError

    def infer_http(self, case: Case, door: str) -> Answer:
        inputs = [
            {
                "name": name,
                "shape": [1, 1],
                "datatype": "BOOL" if isinstance(value, bool) else "BYTES",
                "data": [value],
            }
            for name, value in case.inputs(stream=False).items()
        ]
        answer = Answer()
        with self._post(f"/v2/models/{door}/infer", {"inputs": inputs}) as response:
            body = json.loads(response.read())
        answer.add({output["name"]: output["data"] for output in body["outputs"]})
        return answer

    def generate(self, case: Case, door: str) -> Answer:
        answer = Answer()
        with self._post(f"/v2/models/{door}/generate", case.inputs(stream=False)) as response:
            answer.add(json.loads(response.read()))
        return answer

    def generate_stream(self, case: Case, door: str, leave_after: int | None = None) -> Answer:
        """``leave_after``: responses after which the connection is closed."""
        answer, taken = Answer(), 0
        path = f"/v2/models/{door}/generate_stream"
        with self._post(path, case.inputs(stream=True)) as response:
            while taken != leave_after and (line := response.readline()):
                if not line.strip():
                    continue
                event = json.loads(line.removeprefix(b"data:"))
                if "error" in event:
                    raise Refused("STREAM", event["error"])
                answer.add(event)
                taken += 1
        if leave_after is None and "None" in answer.finishes:
            raise Refused("CUT", "the answer ended without a finish reason")
        return answer

    @contextlib.contextmanager
    def _post(self, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                connection.request("POST", path, json.dumps(body))
                with connection.getresponse() as response:
                    if response.status != http.HTTPStatus.OK:
                        text = response.read().decode(errors="replace")
                        raise Refused(f"HTTP {response.status}", text)
                    yield response
            except TimeoutError:
                raise Refused("TIMEOUT", f"no end in {TIMEOUT_S:.0f} s") from None
            except (OSError, http.client.HTTPException) as error:
                raise Refused("CONNECTION", repr(error)) from None


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        code = (error.status() or "STREAM").removeprefix("StatusCode.")
        code = "TIMEOUT" if code == "DEADLINE_EXCEEDED" else code
        raise Refused(code, error.message()) from None


def _outputs(result: Any) -> dict[str, list[Any]]:
    """A response's output tensors, as lists of their elements."""
    names = [output.name for output in result.get_response().outputs]
    return {
        name: [
            one.decode() if isinstance(one, bytes) else one
            for one in result.as_numpy(name).reshape(-1).tolist()
        ]
        for name in names
    }


# The soak


@dataclass(frozen=True)
class Sent:
    """A request and how it ended. Times are of ``time.monotonic``, in seconds."""

    door: str
    began: float
    ended: float
    code: str
    """answered, left, or an error's"""
    message: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Fault:
    """What was done to the server, and until when its clients may notice."""

    what: str
    began: float
    ended: float
    codes: frozenset[str] | None
    """errors that it explains; None: any"""
    doors: frozenset[str] = frozenset(DOORS)
    """at which it does"""

    def explains(self, sent: Sent) -> bool:
        return (
            sent.door in self.doors
            and (self.codes is None or sent.code in self.codes)
            and sent.began <= self.ended
            and sent.ended >= self.began
        )


class Soak:
    """Traffic for a server, and faults."""

    def __init__(
        self,
        server: TritonServer,
        expected: list[tuple[Case, Answer]],
        clients: int,
        show: Callable[[str], None],
    ) -> None:
        self.server = server
        self.sent: list[Sent] = []
        self.faults: list[Fault] = []
        self._expected = expected
        self._clients = clients
        self._show = show
        self._closed_doors: set[str] = set()
        self._asking: Counter[str] = Counter()
        """requests in flight at each door"""
        self._calls: dict[int, tuple[str, float, str]] = {}
        """of each client's thread the last request: its door, when it was sent, and how"""
        self._lock = threading.Lock()
        self._next_fault = itertools.cycle([self._kill_engine, self._hold_engine, self._kill_stub])

    def traffic(
        self, seconds: float, fault_every_s: float = float("inf"), calm_s: float = 0
    ) -> None:
        """Let all clients ask for so long, with faults but in the last ``calm_s`` of it.

        Returns when the last request has ended.
        """
        end = time.monotonic() + seconds
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._ask, args=[Random(i + len(self.sent)), stop], daemon=True)
            for i in range(self._clients)
        ]
        for thread in threads:
            thread.start()
        try:
            due = time.monotonic() + fault_every_s
            while (now := time.monotonic()) < end:
                if now >= due and now < end - calm_s:
                    self.faults.append(next(self._next_fault)())
                    held = sum(memory_mb(self.server).values())
                    self._show(
                        f"{self.faults[-1].what}; {len(self.sent)} requests so far, {held:.0f} MB"
                    )
                    due = max(due, time.monotonic()) + fault_every_s
                time.sleep(PAUSE_S)
        finally:
            stop.set()
            end = time.monotonic() + HUNG_S
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
                if thread.is_alive():
                    self._give_up(thread)

    def _give_up(self, thread: threading.Thread) -> None:
        """Of a client that is not even told that its time is over, say where it waits."""
        assert thread.ident is not None
        now = time.monotonic()
        door, began, what = self._calls[thread.ident]
        frame = sys._current_frames()[thread.ident]
        self._show(f"HUNG: {what} at {door}\n{''.join(traceback.format_stack(frame))}")
        with self._lock:
            self.sent.append(Sent(door, began, now, "HUNG", what))

    def lost(self) -> list[Sent]:
        return [
            one
            for one in self.sent
            if one.code not in ("answered", "left")
            and not any(fault.explains(one) for fault in self.faults)
        ]

    def _ask(self, random: Random, stop: threading.Event) -> None:
        """Ask one thing after another."""
        client = Client(self.server)
        leaving = [(client.stream_grpc, STREAMED), (client.generate_stream, STREAMED)]
        asking: list[tuple[Callable[[Case, str], Answer], str]] = [
            (client.stream_grpc, STREAMED),
            (client.stream_grpc, STREAMED),
            (client.generate_stream, STREAMED),
            (client.generate, STREAMED),
            (client.infer_grpc, UNARY),
            (client.infer_http, UNARY),
            (client.generate, UNARY),
            (client.infer_grpc, MORTAL),
        ]
        with contextlib.closing(client):
            while not stop.is_set():
                if random.random() < LEAVE_SHARE:
                    call, door = random.choice(leaving)
                    leave = partial(call, LEFT, door, leave_after=random.randrange(1, 20))
                    one = self._one(leave, door, None)
                else:
                    case, answer = random.choice(self._expected)
                    ask, door = random.choice(asking)
                    if door in self._closed_doors:
                        continue
                    one = self._one(partial(ask, case, door), door, answer)
                if one.code not in ("answered", "left"):
                    stop.wait(PAUSE_S)

    def _one(self, call: Callable[[], Answer], door: str, expected: Answer | None) -> Sent:
        """Ask once; ``expected`` is None for a client that leaves."""
        began = time.monotonic()
        with self._lock:
            self._asking[door] += 1
            self._calls[threading.get_ident()] = door, began, repr(call)
        code, message, wrong = "left" if expected is None else "answered", "", False
        try:
            answer = call()
            if expected is not None and not answer.is_like(expected):
                wrong = True
                self._show(f"WRONG at {door}: {answer} instead of {expected}")
        except Refused as error:
            code, message = error.code, str(error)
        except Exception as error:
            code, message = "MALFORMED", repr(error)
        sent = Sent(door, began, time.monotonic(), code, message, wrong)
        with self._lock:
            self._asking[door] -= 1
            self.sent.append(sent)
        return sent

    # Faults: each returns when the server answers as before

    def _kill_engine(self) -> Fault:
        began = time.monotonic()
        for pid in processes(self.server)["engine"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(1.0)  # in which its death is noticed, and everyone told
        self._await_answers(*DOORS)
        return Fault("engine killed", began, time.monotonic(), frozenset({"UNAVAILABLE"}))

    def _hold_engine(self) -> Fault:
        began = time.monotonic()
        [pid] = processes(self.server)["engine"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(HELD_S)
        os.kill(pid, signal.SIGCONT)
        return Fault("engine held", began, time.monotonic(), frozenset())

    def _kill_stub(self) -> Fault:
        began = time.monotonic()
        os.kill(processes(self.server)[f"front ends of {MORTAL}"][0], signal.SIGKILL)
        time.sleep(1.0)  # in which clients are refused
        self._closed_doors.add(MORTAL)
        while self._asking[MORTAL]:
            time.sleep(PAUSE_S)
        ended = time.monotonic()
        with contextlib.closing(triton.InferenceServerClient(self.server.grpc_url)) as client:
            client.unload_model(MORTAL)
            client.load_model(MORTAL, client_timeout=AGAIN_S)
        self._await_answers(MORTAL)
        self._closed_doors.discard(MORTAL)
        return Fault("front end killed", began, ended, None, frozenset({MORTAL}))

    def _await_answers(self, *doors: str) -> None:
        """Wait until each door answers; requests of clients are then answered, too."""
        client = Client(self.server)
        end = time.monotonic() + AGAIN_S
        probe = Case("17+25=", {"temperature": 0.0, "max_tokens": 1})
        with contextlib.closing(client):
            for door in doors:
                ask = client.stream_grpc if door == STREAMED else client.infer_grpc
                while True:
                    try:
                        ask(probe, door)
                        break
                    except Refused as error:
                        if time.monotonic() > end:
                            text = f"{door} does not answer {AGAIN_S:.0f} s after a fault: {error}"
                            raise RuntimeError(text) from None
                        time.sleep(PAUSE_S)


def answers_alone(server: TritonServer, cases: Iterable[Case]) -> list[tuple[Case, Answer]]:
    """Each case with the answer that it gets when the server has nothing else to do.

    On a GPU other company means other rounding. Cases where that can matter are left out: those
    whose answers, with a little temperature, depend on the seed.
    """
    client = Client(server)
    known = []
    with contextlib.closing(client):
        for case in cases:
            answer = client.infer_grpc(case, UNARY)
            others = OTHER_SEEDS if torch.cuda.is_available() else 0
            for seed in range(1000, 1000 + others):
                warm = {"temperature": max(0.1, case.sampling["temperature"]), "seed": seed}
                other = replace(case, sampling={**case.sampling, **warm})
                if not client.infer_grpc(other, UNARY).is_like(answer):
                    break
            else:
                known.append((case, answer))
    return known


# What a server holds


def processes(server: TritonServer) -> dict[str, list[int]]:
    """Process ids of all that a server started, by what they are."""
    found: dict[str, list[int]] = {}
    for pid in server.started():
        with contextlib.suppress(OSError):  # it has just ended
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            found.setdefault(_role(command), []).append(pid)
    return found


def _role(command: list[str]) -> str:
    if "fi_runtime.engine.server" in command:
        return "engine"
    if "fi_runtime.guide_checker" in command:
        return "guide checkers"
    door = re.search(r"/([^/]+)/1/model\.py$", command[1]) if len(command) > 1 else None
    if command[0].endswith("triton_python_backend_stub") and door:
        return f"front ends of {door[1]}"
    return Path(command[0]).name


def memory_mb(server: TritonServer) -> dict[str, float]:
    """Resident memory by what a process is, in 10^6 bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = {}
    for role, pids in sorted(processes(server).items()):
        total = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
        found[role] = round(total / 1e6, 1)
    return found


def metric(server: TritonServer, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text = response.read().decode()
    return sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)))


def pages_held(server: TritonServer, within_s: float = 15.0) -> int:
    """Pages of the cache that sequences hold, or sequences, with no request in flight.

    Clients that left are noticed within a second.
    """
    time.sleep(REPORTED_S)
    end = time.monotonic() + within_s
    while True:
        usage = metric(server, "vllm:kv_cache_usage_perc")
        pages = round(usage * KNOBS["cache_tokens"] / PAGE_SIZE)
        sequences = metric(server, "vllm:num_requests_running") + metric(
            server, "vllm:num_requests_waiting"
        )
        if not pages + sequences or time.monotonic() > end:
            return int(max(pages, sequences))
        time.sleep(0.5)


# The command


@contextlib.contextmanager
def soak_server(
    folder: Path, arguments: list[str] | None = None, kernels: Path | None = None
) -> Iterator[TritonServer]:
    """A server of the default checkpoint, with the three doors."""
    knobs = KNOBS | ({"kernels": str(kernels.resolve())} if kernels else {})
    repository = write_repository(folder / "repository", CHECKPOINT, knobs)
    copy_door(UNARY, repository / MORTAL, {"engine": STREAMED}, instances=1)
    server = TritonServer(repository, arguments or ARGUMENTS, log=folder / "log")
    try:
        with server:
            server.wait_ready()
            yield server
    except BaseException:
        # Its folder goes, and with it what a server that died has said of it.
        print(f"The soak failed{server.log_tail(LAST_LINES)}", file=sys.stderr)
        raise


def row_of(
    soak: Soak, seconds: float, before: Mapping[str, float], pages_leaked: int
) -> dict[str, Any]:
    """The result. ``before``: memory at the start of the ``seconds``, by what a process is."""
    after = memory_mb(soak.server)
    codes = Counter(one.code for one in soak.sent)
    return {
        "sent": len(soak.sent),
        "answered": codes.pop("answered", 0),
        "left": codes.pop("left", 0),
        "failed": codes.total(),
        "failed_by_code": dict(codes),
        "wrong": sum(one.wrong for one in soak.sent),
        "lost": len(soak.lost()),
        "faults": dict(Counter(fault.what for fault in soak.faults)),
        "pages_leaked": pages_leaked,
        "preemptions": int(metric(soak.server, "vllm:num_preemptions_total")),
        "rss_start_mb": round(sum(before.values()), 1),
        "rss_end_mb": round(sum(after.values()), 1),
        "processes_mb": {role: [before.get(role, 0.0), after[role]] for role in after},
        "seconds": round(seconds, 1),
    }


def defects(row: Mapping[str, Any]) -> list[str]:
    """What a result shows that must not be."""
    found = [f"{row[name]} {name}" for name in ("wrong", "lost", "pages_leaked") if row[name]]
    if row["rss_end_mb"] > (1 + GROWTH) * row["rss_start_mb"]:
        found.append(f"memory grew from {row['rss_start_mb']} to {row['rss_end_mb']} MB")
    if not row["answered"]:
        found.append("nothing was answered")
    return found


def main(
    minutes: Annotated[float, typer.Option(help="Of traffic, without what comes before.")] = 30.0,
    clients: Annotated[int, typer.Option(help="That ask at the same time.")] = 12,
    fault_every: Annotated[float, typer.Option(help="Seconds between two faults.")] = 45.0,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Soak a server, and print a table."""
    console = Console()
    seconds = 60 * minutes
    started = time.monotonic()

    def show(text: str) -> None:
        console.print(f"{time.monotonic() - started:7.1f} s  {text}", markup=False, highlight=False)

    with (
        tempfile.TemporaryDirectory() as name,
        soak_server(Path(name), kernels=kernels) as server,
    ):
        expected = answers_alone(server, cases())
        show(f"{len(expected)} requests answered alone")
        soak = Soak(server, expected, clients, show)
        # Of a server that has seen all of it, faults included, memory may stay what it is.
        warm_up_s = max(60.0, seconds / 8)
        soak.traffic(warm_up_s, fault_every_s=warm_up_s / 8, calm_s=warm_up_s / 2)
        pages_held(server)
        before = memory_mb(server)
        show(f"memory at the start: {before}")
        begin = time.monotonic()
        soak.traffic(seconds, fault_every, calm_s=max(20.0, seconds / 10))
        show(f"all of {len(soak.sent)} requests have ended")
        leaked = pages_held(server)
        row = row_of(soak, time.monotonic() - begin, before, leaked)
        for one in soak.lost()[:20]:
            show(
                f"LOST at {one.door} after {one.ended - one.began:.1f} s: {one.code} {one.message}"
            )
    table = Table(title="Soak")
    table.add_column("what")
    table.add_column("value", justify="right")
    for key, value in row.items():
        if isinstance(value, dict):
            for part, number in value.items():
                text = " -> ".join(map(str, number)) if isinstance(number, list) else str(number)
                table.add_row(f"{key}: {part}", text)
        else:
            table.add_row(key, str(value))
    console.print(table)
    if out is not None:
        command = f"python -m bench.soak --minutes {minutes:g} --clients {clients}"
        write_results(out, [row], command)
    found = defects(row)
    for defect in found:
        console.print(f"DEFECT: {defect}", markup=False)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
