"""The class that Triton's Python backend loads, and the threads behind it.

``execute`` is called on Triton's thread and hands requests to the engine while it has credit;
"guides" compiles what answers have to match, and hands those requests over; "tokens" takes what
the engine says and hands it to the "replies" threads (``senders``), which make it text and send the
responses, each those of its own requests; "cancellation" asks Triton five times a second
which clients have gone; "drain" asks it whether it goes on. When the engine dies, "tokens" gets
another one (``supervisor``).
"""

import contextlib
import gc
import itertools
import json
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import triton_python_backend_utils as pb

from fi_runtime.config import MAX_INT32, ConfigError, Device, engine_config, split_parameters
from fi_runtime.frontend.deadline import Deadline
from fi_runtime.frontend.drain import Drain
from fi_runtime.frontend.engine_link import EngineLink
from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.metrics import Metrics, RequestTimes
from fi_runtime.frontend.one_core import OneCore
from fi_runtime.frontend.refused import why_refused
from fi_runtime.frontend.replies import Answer, Grouping
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.frontend.request_log import RequestRecord
from fi_runtime.frontend.requests import Request, Served, parse_request
from fi_runtime.frontend.responder import Responder
from fi_runtime.frontend.senders import Sender
from fi_runtime.frontend.supervisor import Supervisor
from fi_runtime.messages import Abort, AsksServer, Generate, Output, encode
from fi_runtime.shared_memory import remove_of_stub
from fi_runtime.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

CANCELLATION_CHECK_S = 0.2
STUB_END_S = 2.0
DRAIN_END_S = 1.0
"""for an answer of the server's, which takes a tenth of a millisecond"""
MAX_GUIDED = 8
"""requests whose guides wait to be compiled; as many as leave Triton's queue together"""
SENDERS = 3
"""threads that send: one mostly waits for the server to take a response, without Python's lock"""


@dataclass(frozen=True)
class Waiting:
    """A request that Triton has handed over, and no engine has heard of."""

    responder: Responder
    deadline: Deadline


@dataclass(frozen=True)
class Arrival(Waiting):
    """One that nobody has read."""

    request: Any
    """Triton's"""
    at: float
    """of time.monotonic"""


@dataclass(frozen=True)
class Submission(Waiting):
    """One that the engine may have."""

    request: Request
    numbers: range
    """of its samples"""
    answer: Answer
    times: RequestTimes


@dataclass(frozen=True, eq=False)
class InFlight:
    """A request between its arrival and its last response."""

    link: EngineLink
    """to the engine that it was given to; no other one knows of it"""
    numbers: range
    """what the engine knows its samples by"""
    sender: "Sender[InFlight]"
    answer: Answer
    responder: Responder
    times: RequestTimes
    deadline: Deadline


class TritonPythonModel:
    """A door: one instance of a Triton model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Attach to the engine, starting it if need be.

        Raises:
            TritonModelException: the model cannot be served; says why.
        """
        logging.basicConfig(
            level=logging.INFO,
            format=f"%(asctime)s {args['model_instance_name']} %(levelname)s %(message)s",
        )
        self._server_pid = os.getppid()  # the stub is the server's child
        self._closing = threading.Event()
        try:
            self._set_up(args)
        except ConfigError as error:
            raise pb.TritonModelException(str(error)) from None
        model_config = json.loads(args["model_config"])
        self._decoupled = model_config["model_transaction_policy"]["decoupled"]
        self._batched = model_config["max_batch_size"] > 0
        instances = sum(
            group["count"] * max(1, len(group.get("gpus", [])))
            for group in model_config["instance_group"]
        )
        self._why_refused = partial(why_refused, args["model_name"], self._decoupled)
        self._drain = Drain(
            self._why_refused, instances, self._server_pid, self._closing, self._tell_asking
        )
        self._next_number = 0
        self._in_flight: dict[int, InFlight] = {}
        """by the number of each sample that is not complete"""
        self._senders = [Sender(self._take, self._respond) for _ in range(SENDERS)]
        self._next_sender = itertools.cycle(self._senders)
        self._guided: deque[Submission] = deque()
        """what waits for its guide to be compiled; the first one may wait for credit instead"""
        self._guided_changed = threading.Condition()
        senders = [sender.thread for sender in self._senders]
        self._senders_core = OneCore(senders)
        # Daemons, as the senders' are, since a server that dies does not call finalize: nothing
        # would end them, and they would keep this process from its end.
        self._threads = [
            threading.Thread(target=self._receive, name="tokens", daemon=True),
            threading.Thread(target=self._watch, name="cancellation", daemon=True),
            threading.Thread(target=self._guide, name="guides", daemon=True),
        ]
        self._drain_thread = threading.Thread(target=self._drain.watch, name="drain", daemon=True)
        self._drain_thread.start()
        for thread in self._threads:
            thread.start()
        self._threads += senders
        # What has been loaded stays; without this, collections walk all of it beside requests.
        gc.collect()
        gc.freeze()

    def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered through its sender, and an error is its own alone."""
        self._drain.has_served()
        line = deque(self._arrival(request) for request in requests)
        while line:
            with _told_errors(line[0].responder):
                if not line[0].responder.has_ended:
                    submission = self._read(line[0])
                    if submission.request.guide is None:
                        self._submit(submission, line)
                    else:
                        self._hold(submission, line)
            line.popleft()

    def _arrival(self, request: Any) -> Arrival:
        arrived = time.monotonic()
        record = RequestRecord(request.request_id(), arrived) if self._log_requests else None
        sender = request.get_response_sender()
        responder = Responder(sender, self._batched, self._why_refused, record)
        deadline = Deadline.of(arrived, self._served.limits.request_timeout_s, request.timeout())
        return Arrival(responder, deadline, request, arrived)

    def finalize(self) -> None:
        """Leave the engine. Triton calls this when every request has had its last response."""
        self._closing.set()
        with self._guided_changed:
            self._guided_changed.notify_all()
        for thread in self._threads:
            thread.join()
        # RACE: what it asked last may never be answered by a server that unloads its model.
        self._drain_thread.join(DRAIN_END_S)
        self._metrics.close()
        self._supervisor.link.close()

    def _set_up(self, args: dict[str, str]) -> None:
        folder, name = Path(args["model_repository"]), args["model_name"]
        kind = args["model_instance_kind"]
        if kind not in ("CPU", "GPU"):
            raise ConfigError(
                f"{name}/config.pbtxt: instance_group kind KIND_{kind} is not supported; "
                "use KIND_GPU, KIND_CPU, or KIND_AUTO for whichever the machine has"
            )
        gpu = int(args["model_instance_device_id"]) if kind == "GPU" else None
        device: Device = "cpu" if gpu is None else "cuda"
        parameters = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"]).get("parameters", {}).items()
        }
        door, own = split_parameters(parameters, name)
        self._log_requests = door.log_requests
        self._grouping = Grouping(door.stream_interval, door.max_group_tokens or MAX_INT32)
        if door.engine:
            config = read_engine_config(folder.parent / door.engine, device)
        else:
            config = engine_config(own, folder, device)
        connect = partial(
            EngineLink,
            config,
            door.engine or name,
            gpu,
            self._server_pid,
            door.engine_start_timeout_s,
            self._closing,
        )
        link = connect()
        version = {"version": args["model_version"]}
        self._metrics = Metrics(
            {"model": name, **version},
            {"model": door.engine or name, **version, **({} if gpu is None else {"gpu": str(gpu)})},
            link.info.max_context,
        )
        self._supervisor = Supervisor(
            link, connect, config, self._metrics, self._hand_out, self._closing
        )
        self._tokenizer = load_tokenizer(Path(link.info.tokenizer))
        self._served = Served.of(Path(config.checkpoint), self._tokenizer, link.info, config)

    def _read(self, arrival: Arrival) -> Submission:
        """What a client has sent. One thread only."""
        tensors = {tensor.name(): tensor.as_numpy() for tensor in arrival.request.inputs()}
        parameters = json.loads(arrival.request.parameters() or "{}")
        parsed = parse_request(tensors, parameters, self._served)
        if parsed.flags.stream and not self._decoupled:
            raise RequestError(
                "INVALID_ARG",
                "stream=true: this model answers with one response; use the decoupled model to "
                "stream, or leave stream out",
            )
        numbers = range(self._next_number, self._next_number + len(parsed.samples))
        self._next_number = numbers.stop
        times = RequestTimes(arrival.at, len(parsed.prompt), len(parsed.samples))
        if arrival.responder.record is not None:
            arrival.responder.record.times = times
        answer = Answer(parsed, self._tokenizer, self._grouping)
        return Submission(arrival.responder, arrival.deadline, parsed, numbers, answer, times)

    def _hold(self, submission: Submission, line: Sequence[Waiting]) -> None:
        """Leave a request with a guide to the thread that compiles; block while it has enough."""
        has_room = False
        while not has_room:
            with self._guided_changed:
                has_room = self._guided_changed.wait_for(
                    lambda: len(self._guided) < MAX_GUIDED, CANCELLATION_CHECK_S
                )
                if has_room:
                    self._guided.append(submission)
                    self._guided_changed.notify_all()
            if not has_room:
                self._end_those_in_vain(line)

    def _guide(self) -> None:
        """Compile guides and hand those requests over, one by one, until the model is closed."""
        while True:
            with self._guided_changed:
                self._guided_changed.wait_for(lambda: self._guided or self._closing.is_set())
            if not self._guided:
                return
            submission = self._guided[0]
            with _told_errors(submission.responder):
                guide = submission.request.guide
                if not submission.responder.has_ended and guide is not None:
                    self._submit(submission, self._guided, guide.compiled())
            with self._guided_changed:
                self._guided.popleft()
                self._guided_changed.notify_all()

    def _submit(self, submission: Submission, line: Sequence[Waiting], guide: str = "") -> None:
        """Hand a request over to the engine, once there is room.

        Args:
            line: those that wait with it, itself first.
            guide: in the form that the engine takes; empty for none.
        """
        responder, numbers = submission.responder, submission.numbers
        # A request that no engine has heard of is not hurt by an engine's death: it waits.
        has_credit = False
        while not has_credit:
            link = self._await_engine(line)
            prompt, samples = submission.request.prompt, submission.request.samples
            messages = [
                encode(
                    Generate(link.name, number, prompt, msgspec.structs.replace(one, guide=guide))
                )
                for number, one in zip(numbers, samples, strict=True)
            ]
            has_credit = self._await_credit(link, line)
        in_flight = InFlight(
            link,
            numbers,
            next(self._next_sender),
            submission.answer,
            responder,
            submission.times,
            submission.deadline,
        )
        # Before the engine hears of them, since its answers come on another thread.
        # RACE: the engine may be lost by now; "cancellation" then ends the request.
        self._in_flight |= dict.fromkeys(numbers, in_flight)
        for number, message in zip(numbers, messages, strict=True):
            if not has_credit:
                try:
                    if not self._await_credit(link, line):
                        return
                except RequestError as error:
                    self._end(in_flight, error)
                    return
            # Nothing between the credit and the sending may fail: the credit would be lost.
            link.send(message)
            has_credit = False
            # RACE: the request may have ended meanwhile, with an abort that came before this.
            if number not in self._in_flight:
                link.send(encode(Abort(link.name, number)))

    def _await_engine(self, line: Sequence[Waiting]) -> EngineLink:
        """Block until there is an engine."""
        while (link := self._supervisor.link).lost:
            # Asked once: another thread may meanwhile have found an engine.
            if reason := self._supervisor.gave_up:
                raise RequestError("UNAVAILABLE", reason)
            self._end_those_in_vain(line)
            time.sleep(CANCELLATION_CHECK_S)
        return link

    def _await_credit(self, link: EngineLink, line: Sequence[Waiting]) -> bool:
        """Block until the engine has room, which leaves all else to Triton's own queue.

        False if it is lost.
        """
        while not link.take_credit(CANCELLATION_CHECK_S):
            if link.lost:
                return False
            self._end_those_in_vain(line)
        return True

    def _end_those_in_vain(self, line: Sequence[Waiting]) -> None:
        """End what waits in vain behind the request whose turn it is; raise if that one does."""
        self._end_those_behind(line)
        if (error := self._in_vain(line[0])) is not None:
            raise error

    def _end_those_behind(self, line: Sequence[Waiting]) -> None:
        for waiting in list(line)[1:]:  # copied, since other threads add to it
            if (error := self._in_vain(waiting)) is not None:
                waiting.responder.fail(error)

    def _in_vain(self, waiting: Waiting) -> RequestError | None:
        """Why a request need wait no longer."""
        if waiting.responder.is_cancelled():
            return RequestError("CANCELLED", "the request was cancelled")
        return self._ending() if self._drain.is_over else waiting.deadline.error

    def _ending(self) -> RequestError:
        return RequestError(
            "UNAVAILABLE",
            "the server, or this model, is ending, and the request was not done within "
            f"{self._drain.seconds:.1f} s; send it to another server",
        )

    def _receive(self) -> None:
        """Take what engines say until the model is closed, and then let the senders go."""
        self._supervisor.run()
        for sender in self._senders:
            sender.close()

    def _hand_out(self, outputs: list[Output]) -> None:
        """Give each output to the sender of its request."""
        shares: dict[Sender[InFlight], list[Output]] = defaultdict(list)
        for output in outputs:
            # What has ended here first, by a stop string or an error, is nobody's any more.
            if (in_flight := self._in_flight.get(output.request)) is not None:
                shares[in_flight.sender].append(output)
        for sender, share in shares.items():
            sender.give(share, alone=len(outputs) == 1)

    def _take(self, output: Output) -> InFlight | None:
        """Add an output to its answer; the request, if it has a response to send."""
        in_flight = self._in_flight.get(output.request)
        if in_flight is None:
            return None
        try:
            complete = in_flight.answer.take(output.request - in_flight.numbers.start, output)
        except Exception as error:
            self._end(in_flight, error)
            return None
        self._metrics.took(in_flight.times, len(output.tokens))
        if complete:
            self._forget(output.request, at_engine=output.finish is None)
        return in_flight if in_flight.answer.has_response else None

    def _respond(self, in_flight: InFlight) -> None:
        answer = in_flight.answer
        try:
            sent = False
            while answer.has_response:
                sent = in_flight.responder.send(answer.response(), last=answer.is_over)
            if answer.is_over and sent:
                self._metrics.finished(in_flight.times)
        except Exception as error:
            self._end(in_flight, error)

    def _end(self, in_flight: InFlight, error: Exception) -> None:
        """End a request that cannot go on, here and at the engine."""
        if not isinstance(error, RequestError):
            log.error("request %d failed", in_flight.numbers.start, exc_info=error)
            error = _surprise(error)
        for number in in_flight.numbers:
            self._forget(number, at_engine=True)
        in_flight.responder.fail(error)

    def _forget(self, number: int, at_engine: bool) -> None:
        # Two threads may forget the same one.
        in_flight = self._in_flight.pop(number, None)
        if in_flight is not None and at_engine:
            in_flight.link.send(encode(Abort(in_flight.link.name, number)))

    def _tell_asking(self, ends: bool) -> None:
        """Have the engine watch whether the server answers, or no more."""
        # RACE: an engine that dies does not hear it; the next one does before the next question.
        link = self._supervisor.link
        link.send(encode(AsksServer(link.name, ends)))

    def _watch(self) -> None:
        """End what nobody waits for, or no engine computes, any more; notice a dead server.

        And keep the senders where they are fast.
        """
        while not self._closing.wait(CANCELLATION_CHECK_S):
            self._senders_core.check()
            if os.getppid() != self._server_pid:
                log.error("the server is gone")
                # Triton's stub notices too, and ends with its shared memory removed, unless it is
                # caught in a call that nobody is left to answer.
                time.sleep(STUB_END_S)
                remove_of_stub(os.getpid())
                os._exit(1)
            # The first has its turn, and is that thread's own.
            self._end_those_behind(self._guided)
            for in_flight in self._requests():
                link = in_flight.link
                if link.lost:
                    reason = f"the engine died: {link.lost}; send the request again"
                    self._end(in_flight, RequestError("UNAVAILABLE", reason))
                elif self._drain.is_over:
                    self._end(in_flight, self._ending())
                elif (late := in_flight.deadline.error) is not None:
                    self._end(in_flight, late)
                # RACE: one behind may have ended as its turn came; nobody waits for it either.
                elif in_flight.responder.has_ended or in_flight.responder.is_cancelled():
                    for number in in_flight.numbers:
                        link.send(encode(Abort(link.name, number)))

    def _requests(self) -> list[InFlight]:
        """Those in flight, each once."""
        return list({id(one): one for one in list(self._in_flight.values())}.values())


@contextlib.contextmanager
def _told_errors(responder: Responder) -> Iterator[None]:
    """End a request with the error that it meets, which must not be the others'."""
    try:
        yield
    except RequestError as error:
        responder.fail(error)
    except Exception as error:
        log.exception("a request failed")
        responder.fail(_surprise(error))


def _surprise(error: Exception) -> RequestError:
    """For one request's failure that nobody foresaw, which must not be the others'."""
    return RequestError("INTERNAL", f"the request failed: {error!r}; the server's log has more")
