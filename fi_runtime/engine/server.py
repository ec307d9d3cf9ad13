"""The engine as a process: takes requests from front ends' sockets, sends them their tokens.

    python -m fi_runtime.engine.server RUN_FOLDER SERVER_PID ALIVE_FD

``ALIVE_FD`` is the locked file that says the engine lives (see run_folder). The process ends when
the server is gone, or when its last front end has left.
"""

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
import zmq

from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.core import BadRequest, Engine
from fi_runtime.engine.credits import Credits
from fi_runtime.engine.outputs import Tokens
from fi_runtime.engine.phases import Phases, process_begin
from fi_runtime.engine.sequence import SequenceKey
from fi_runtime.engine.server_watch import ServerWatch, watch_for_crash
from fi_runtime.messages import (
    HEARTBEAT_S,
    INT64,
    NOT_A_MESSAGE,
    SHOW_STACKS,
    Abort,
    AsksServer,
    Attach,
    Attached,
    Detach,
    Detached,
    EngineInfo,
    FromEngine,
    FromFrontEnd,
    Generate,
    Output,
    Stats,
    Step,
    decode_from_front_end,
    encode,
)
from fi_runtime.run_folder import RunFolder, starting_lock
from fi_runtime.shared_memory import remove_of_stub
from fi_runtime.tokenizer import tokenizer_file

log = logging.getLogger(__name__)

FRONT_ENDS_END_S = 4.0
"""for front ends to end by themselves once the server is gone, which takes them about two"""
HEARTBEAT_MS = int(HEARTBEAT_S * 1000)
STATS_S = 1.0
"""between two words to a front end about how the engine is"""
AWAKE_S = 0.01
"""after its last step that an engine on a GPU looks for requests without ever sleeping: a core that
wakes is slow at first, and a client's next request mostly comes right after its last answer"""
ATTACH_WITHIN_MS = 30_000
"""for the first front end, once the engine is ready; later ones find the engine by its lock"""


class EngineServer:
    """Runs an engine for the front ends that attach to it."""

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        credits: Credits,
        server_pid: int,
        server_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._info = info
        self._credits = credits
        self._front_ends: dict[bytes, int] = {}
        """attached front ends and the pidfd of each one's process"""
        self._pids: dict[int, int] = {}
        """by pidfd"""
        self._server_pid = server_pid
        self._server_fd = os.pidfd_open(server_pid)
        self._server_watch = ServerWatch(server_timeout_s)
        self._outbox: dict[bytes, list[Output]] = defaultdict(list)
        self._columns: dict[bytes, tuple[bytes, bytes]] = {}
        """as ``Step`` has them: requests and tokens"""
        self._attached_before = False
        self._idle = True
        self._stats_due = self._heartbeat_due = self._sleep_due = 0.0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._requests = context.socket(zmq.PULL)
        self._outputs = context.socket(zmq.ROUTER)
        # A full queue would block, or drop tokens; what can be in it is bounded by the credits.
        self._requests.rcvhwm = self._outputs.sndhwm = 0
        # Refuse an unknown address instead of dropping what is sent to it.
        self._outputs.router_mandatory = True
        self._poller = zmq.Poller()
        self._poller.register(self._requests, zmq.POLLIN)
        self._poller.register(self._outputs, zmq.POLLIN)
        self._poller.register(self._server_fd, zmq.POLLIN)

    def bind(self, folder: RunFolder) -> None:
        self._requests.bind(folder.requests)
        self._outputs.bind(folder.outputs)

    def run(self) -> None:
        """Serve until the server is gone or the last front end has left."""
        closing = threading.Event()
        arguments = self._server_pid, self._server_has_crashed, closing
        threading.Thread(target=watch_for_crash, args=arguments, daemon=True).start()
        try:
            self._serve()
        finally:
            closing.set()

    def _serve(self) -> None:
        while self._front_ends or not self._attached_before:
            idle_ms = HEARTBEAT_MS if self._front_ends else ATTACH_WITHIN_MS
            ready = dict(self._poller.poll(0 if self._stays_awake() else idle_ms))
            if self._server_fd in ready:
                log.info("the server is gone")
                self._end_front_ends()
                return
            if not ready and not self._attached_before:
                log.error("no front end attached within %d s", ATTACH_WITHIN_MS // 1000)
                return
            if self._outputs in ready:
                self._receive(self._outputs)
            if self._requests in ready:
                self._receive(self._requests)
            for front_end in [f for f, fd in self._front_ends.items() if fd in ready]:
                log.warning("front end %s died", front_end.decode())
                self._detach(front_end)
            # Also of work that one step begins and ends.
            self._idle = self._idle and not self._engine.busy
            outputs = self._engine.step()
            for key, output in outputs.others:
                self._post(key, output)
            if outputs.columns is not None:
                self._post_columns(outputs.columns, outputs.front_ends)
            self._send(self._new_stats())
        log.info("the last front end has left")

    def _stays_awake(self) -> bool:
        """Whether there is something to compute, or is likely to be at any moment."""
        if not self._engine.runs_ahead:
            return self._engine.busy  # its cores are those that everything else runs on
        now = time.monotonic()
        if self._engine.busy:
            self._sleep_due = now + AWAKE_S
        return now < self._sleep_due

    def _server_hangs(self) -> None:
        log.error(
            "the server has answered none of its front ends for %g s, and is killed",
            self._server_watch.timeout_s,
        )
        self._kill_server()

    def _server_has_crashed(self) -> None:
        log.error("the server has crashed, does not end, and is killed")
        self._kill_server()

    def _kill_server(self) -> None:
        """So that what runs it starts it again."""
        # RACE: it may have ended just now.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._server_fd, signal.SIGKILL)

    def _end_front_ends(self) -> None:
        """Kill those that do not end by themselves.

        One that was in a call to the server waits for ever for its answer, and no thread of its own
        can end it, since Python's lock is held in some of these calls.
        """
        deadline = time.monotonic() + FRONT_ENDS_END_S
        waiting = set(self._front_ends.values())
        poller = zmq.Poller()
        for fd in waiting:
            poller.register(fd, zmq.POLLIN)
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(int(left_s * 1000) + 1):
                poller.unregister(fd)
                waiting.discard(fd)
        for fd in waiting:
            log.warning("a front end that outlives the server is killed")
            remove_of_stub(self._pids[fd])  # it still lives: the number is nobody else's
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)

    def _receive(self, socket: "zmq.Socket[bytes]") -> None:
        """Take every message that is there."""
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_from_front_end(frames[-1])
            except NOT_A_MESSAGE as error:
                log.error("a message that is none was ignored: %s", error)
                continue
            self._handle(message)

    def _handle(self, message: FromFrontEnd) -> None:
        # What a front end sent before it left may come after word of its leaving.
        if not isinstance(message, Attach) and message.front_end not in self._front_ends:
            return
        match message:
            case Attach(front_end, pid):
                self._attach(front_end, pid)
            case Detach(front_end):
                self._detach(front_end)
                self._say(front_end, Detached())
            case Generate(front_end, request, prompt, params):
                self._credits.use(front_end)
                try:
                    self._engine.add((front_end, request), prompt, params)
                except BadRequest as error:
                    refusal = Output(request, [], None, "refused", str(error))
                    self._post((front_end, request), refusal)
            case Abort(front_end, request):
                if self._engine.abort((front_end, request)):
                    self._post((front_end, request), Output(request, [], None, "cancelled"))
            case AsksServer(front_end, ends):
                if ends:
                    self._server_watch.ends(front_end)
                else:
                    self._server_watch.asks(front_end)

    def _attach(self, front_end: bytes, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        self._front_ends[front_end] = fd
        self._pids[fd] = pid
        self._attached_before = True
        self._poller.register(fd, zmq.POLLIN)
        self._credits.attach(front_end)
        self._say(front_end, Attached(self._info))
        log.info("front end %s attached (%d in all)", front_end.decode(), len(self._front_ends))

    def _detach(self, front_end: bytes) -> None:
        fd = self._front_ends.pop(front_end, None)
        if fd is None:
            return
        self._poller.unregister(fd)
        del self._pids[fd]
        os.close(fd)
        self._server_watch.ends(front_end)
        for key in self._engine.keys_of(front_end):
            self._engine.abort(key)
        self._credits.detach(front_end)
        self._outbox.pop(front_end, None)
        self._columns.pop(front_end, None)

    def _post(self, key: SequenceKey, output: Output) -> None:
        self._outbox[key[0]].append(output)
        if output.finish is not None:
            self._credits.give_back(key[0])

    def _post_columns(self, columns: Tokens, front_ends: list[bytes]) -> None:
        for owner in np.unique(columns.owners).tolist():
            own = columns.owners == owner
            requests, tokens = (
                column[own].astype(INT64).tobytes() for column in (columns.requests, columns.tokens)
            )
            self._columns[front_ends[owner]] = requests, tokens

    def _new_stats(self) -> Stats | None:
        """How the engine is, once a second while it computes and once when it has nothing to do."""
        now, idle = time.monotonic(), not self._engine.busy
        if (idle and self._idle) or (idle == self._idle and now < self._stats_due):
            return None
        self._idle, self._stats_due = idle, now + STATS_S
        return self._engine.stats()

    def _send(self, stats: Stats | None) -> None:
        """One message to each front end that something has happened for, or that waits to hear."""
        granted = self._credits.grant()
        # Any one front end, but one only: it adds counts to those of its model.
        told = {front_end: stats for front_end in [*self._front_ends][:1] if stats is not None}
        addressed = self._outbox.keys() | self._columns.keys() | granted.keys() | told.keys()
        if (now := time.monotonic()) >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_S
            addressed |= self._front_ends.keys()
            if self._server_watch.beat():
                self._server_hangs()
        for front_end in addressed:
            outputs = self._outbox.get(front_end, [])
            requests, tokens = self._columns.get(front_end, (b"", b""))
            credits = granted.get(front_end, 0)
            step = Step(outputs, credits, told.get(front_end), requests, tokens)
            self._say(front_end, step)
        self._outbox.clear()
        self._columns.clear()

    def _say(self, front_end: bytes, message: FromEngine) -> None:
        try:
            self._outputs.send_multipart([front_end, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Its socket closed first; its pidfd tells the rest.
            log.warning("front end %s is out of reach: %s", front_end.decode(), error)


def main(argv: list[str]) -> int:
    phases = Phases(process_begin())
    phases.end("imports")
    folder, server_pid, alive_fd = RunFolder(Path(argv[0])), int(argv[1]), int(argv[2])
    os.set_inheritable(alive_fd, False)  # a child of the engine must not outlive it as the engine
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s engine[{os.getpid()}] %(levelname)s %(message)s"
    )
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS)
    folder.pid_file.write_text(f"{os.getpid()}\n")
    try:
        config = msgspec.json.decode(folder.config.read_bytes(), type=EngineConfig)
        tokenizer = tokenizer_file(Path(config.checkpoint), folder.path)
        engine = Engine(config, phases, tokenizer)
    except ConfigError as error:
        return _fail(folder, str(error))
    except Exception as error:
        log.exception("the engine could not start")
        return _fail(folder, f"the engine could not start: {error!r}")
    info = EngineInfo(
        pid=os.getpid(),
        vocab_size=engine.model_config.vocab_size,
        max_context=engine.max_context,
        tokenizer=str(tokenizer),
    )
    # What has been loaded stays; without this, collections walk all of it every few steps.
    gc.collect()
    gc.freeze()
    credits = Credits(config.max_sequences)
    server = EngineServer(engine, info, credits, server_pid, config.server_timeout_s)
    server.bind(folder)
    log.info("started in %s", phases)
    try:
        server.run()
    except Exception as error:
        log.exception("the engine cannot go on")
        _fail(folder, f"{error!r}; the server's log has more")
        # At once: what else would be waited for may hang, after an error of the device above all.
        os._exit(1)
    with starting_lock():
        folder.remove()
    return 0


def _fail(folder: RunFolder, reason: str) -> int:
    """Leave word for the front ends, if the disk has room for it."""
    with contextlib.suppress(OSError):
        folder.failure.write_text(reason, encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
