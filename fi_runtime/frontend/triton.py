"""The class that Triton's Python backend loads, and the threads behind it.

``execute`` is called on Triton's thread and hands requests to the engine while it has credit;
"replies" takes the engine's tokens and sends the responses; "cancellation" asks Triton a few times
a second which clients have gone.
"""

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb
from tokenizers import Tokenizer

from fi_runtime.config import ConfigError, DoorConfig, EngineConfig, engine_config, split_parameters
from fi_runtime.frontend.engine_link import EngineLink
from fi_runtime.frontend.replies import Answer, Tensors
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.frontend.requests import RequestError, parse_request
from fi_runtime.messages import Abort, Generate, Output, Step

log = logging.getLogger(__name__)

CANCELLATION_CHECK_S = 0.1
STUB_END_S = 2.0


class InFlight:
    """A request between its arrival and its last response."""

    def __init__(self, number: int, answer: Answer, sender: Any, batched: bool) -> None:
        self.number = number
        self.answer = answer
        self._sender = sender
        self._batched = batched
        # NOTE: after its last response a sender's memory in the server is freed; asking it whether
        # its client has gone would then read freed memory, so both happen under this lock.
        self._lock = threading.Lock()
        self._ended = False

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._ended and self._sender.is_cancelled()

    def send(self, tensors: Tensors, last: bool) -> None:
        outputs = [
            pb.Tensor(name, value[None] if self._batched else value)
            for name, value in tensors.items()
        ]
        self._send(pb.InferenceResponse(output_tensors=outputs), last)

    def fail(self, error: RequestError) -> None:
        self._send(_error_response(error), last=True)

    def _send(self, response: Any, last: bool) -> None:
        with self._lock:
            if not self._ended:
                self._ended = last
                flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
                self._sender.send(response, flags=flags)


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
        try:
            self._attach(args)
        except ConfigError as error:
            raise pb.TritonModelException(str(error)) from None
        model_config = json.loads(args["model_config"])
        self._decoupled = model_config["model_transaction_policy"]["decoupled"]
        self._batched = model_config["max_batch_size"] > 0
        self._inputs = [one["name"] for one in model_config["input"]]
        self._numbers = itertools.count()
        self._in_flight: dict[int, InFlight] = {}
        self._credits = threading.Semaphore(0)
        self._engine_lost = threading.Event()
        self._closing = threading.Event()
        # Daemons, since a server that dies does not call finalize: nothing would end them, and
        # they would keep this process from its end.
        self._threads = [
            threading.Thread(target=self._reply, name="replies", daemon=True),
            threading.Thread(target=self._watch, name="cancellation", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered through its sender, and an error is its own alone."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except RequestError as error:
                _send_error(sender, error)
            except Exception as error:  # one request's surprise must not end the others
                log.exception("a request failed")
                _send_error(sender, RequestError("INTERNAL", repr(error)))

    def finalize(self) -> None:
        """Leave the engine. Triton calls this when every request has had its last response."""
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._link.close()

    def _attach(self, args: dict[str, str]) -> None:
        folder, name = Path(args["model_repository"]), args["model_name"]
        if args["model_instance_kind"] != "CPU":
            raise ConfigError(
                f"{name}/config.pbtxt: instance_group kind KIND_{args['model_instance_kind']}: "
                "this engine runs on the CPU; use KIND_CPU"
            )
        parameters = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"]).get("parameters", {}).items()
        }
        door, own = split_parameters(parameters, name)
        if door.engine:
            config = read_engine_config(folder.parent / door.engine)
        else:
            config = engine_config(own, folder)
        self._start_link(door, config, door.engine or name)

    def _start_link(self, door: DoorConfig, config: EngineConfig, engine: str) -> None:
        self._link = EngineLink(config, engine, self._server_pid, door.engine_start_timeout_s)
        self._tokenizer = Tokenizer.from_file(self._link.info.tokenizer)
        # A tokenizer.json may ask for either; both would change prompts behind their back.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _submit(self, request: Any, sender: Any) -> None:
        tensors = {
            name: tensor.as_numpy()
            for name in self._inputs
            if (tensor := pb.get_input_tensor_by_name(request, name)) is not None
        }
        parameters = json.loads(request.parameters() or "{}")
        parsed = parse_request(tensors, parameters, self._tokenizer, self._link.info)
        if parsed.flags.stream and not self._decoupled:
            raise RequestError(
                "INVALID_ARG",
                "stream=true: this model answers with one response; use the decoupled model to "
                "stream, or leave stream out",
            )
        self._await_credit(sender)
        number = next(self._numbers)
        answer = Answer(parsed, self._tokenizer)
        # Before the engine hears of it, since its answer comes on another thread.
        self._in_flight[number] = InFlight(number, answer, sender, self._batched)
        self._link.send(Generate(self._link.name, number, parsed.prompt, parsed.params))

    def _await_credit(self, sender: Any) -> None:
        """Block until the engine has room, which leaves all else to Triton's own queue."""
        while not self._credits.acquire(timeout=CANCELLATION_CHECK_S):
            if sender.is_cancelled():
                raise RequestError("CANCELLED", "the request was cancelled")
            if self._engine_lost.is_set():
                break
        if self._engine_lost.is_set():
            raise _engine_lost()

    def _reply(self) -> None:
        """Send what the engine gives until the model is closed."""
        while not self._closing.is_set():
            steps = [m for m in self._link.receive() if isinstance(m, Step)]
            for step in steps:
                if step.credits:
                    self._credits.release(step.credits)
            # What has come since the last look is sent as one response a request.
            for request in self._take(itertools.chain.from_iterable(s.outputs for s in steps)):
                if request.answer.has_response:
                    self._respond(request)

    def _respond(self, request: InFlight) -> None:
        try:
            request.send(request.answer.response(), last=bool(request.answer.finish))
        except Exception:  # one request's surprise must not end the others
            log.exception("request %d could not be answered", request.number)
            self._in_flight.pop(request.number, None)
            self._link.send(Abort(self._link.name, request.number))

    def _take(self, outputs: Iterator[Output]) -> list[InFlight]:
        """Add outputs to their answers; the requests that are the richer for it, each once."""
        touched: dict[int, InFlight] = {}
        for output in outputs:
            request = self._in_flight.get(output.request)
            if request is None:
                continue  # it ended here first, by a stop string or its client's leave
            try:
                request.answer.take(output)
            except RequestError as error:
                del self._in_flight[output.request]
                touched.pop(output.request, None)
                request.fail(error)
                continue
            touched[output.request] = request
            if request.answer.finish:
                del self._in_flight[output.request]
                if output.finish is None:
                    self._link.send(Abort(self._link.name, output.request))
        return list(touched.values())

    def _watch(self) -> None:
        """Abort what nobody waits for any more; notice an engine or a server that died."""
        while not self._closing.wait(CANCELLATION_CHECK_S):
            if os.getppid() != self._server_pid:
                log.error("the server is gone")
                # Triton's stub notices too, and ends with its shared memory removed, unless it is
                # caught in a call that nobody is left to answer.
                time.sleep(STUB_END_S)
                os._exit(1)
            for request in list(self._in_flight.values()):
                if request.is_cancelled():
                    self._link.send(Abort(self._link.name, request.number))
            if not self._engine_lost.is_set() and not self._link.engine_lives():
                log.error("the engine died")
                self._engine_lost.set()
            if self._engine_lost.is_set():
                for number in list(self._in_flight):
                    lost = self._in_flight.pop(number, None)
                    if lost is not None:
                        lost.fail(_engine_lost())


def _engine_lost() -> RequestError:
    return RequestError("UNAVAILABLE", "the engine died; load the model again to start a new one")


def _error_response(error: RequestError) -> Any:
    code = getattr(pb.TritonError, error.code)
    return pb.InferenceResponse(error=pb.TritonError(str(error), code))


def _send_error(sender: Any, error: RequestError) -> None:
    sender.send(_error_response(error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
