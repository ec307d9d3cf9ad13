"""Starts the engine if this front end is the first to need it, and talks to it."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from typing import IO

import msgspec
import zmq

from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.messages import (
    SHOW_STACKS,
    Attach,
    Attached,
    Detach,
    Detached,
    EngineInfo,
    FromEngine,
    decode_from_engine,
    encode,
)
from fi_runtime.run_folder import RunFolder, is_held, remove_stale, starting_lock

log = logging.getLogger(__name__)

POLL_S = 0.2
SHOW_STACKS_S = 0.5
"""for an engine to write what its threads do before it is killed"""
ENGINE = "fi_runtime.engine.server"
"""the module that is run as the engine; a measurement of all the rest puts another one here"""


class EngineLink:
    """This process's channel to one engine: that on the CPU, or on the GPU of that number.

    It ends with its engine. Whoever starts the next one, that is reached by another link.

    Args:
        config: what the engine has to run with.
        engine: name of the model that holds these knobs.
        gpu: the GPU's number, None for the CPU.
        server_pid: of the server, with which the engine ends.
        start_timeout_s: for the engine to be ready.
        closing: set to give up waiting for it.

    Raises:
        ConfigError: the engine cannot serve this configuration, cannot start, or runs already with
            another one.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine: str,
        gpu: int | None,
        server_pid: int,
        start_timeout_s: float,
        closing: threading.Event | None = None,
    ) -> None:
        engine += "" if gpu is None else f"-gpu{gpu}"
        self._folder = RunFolder.of(server_pid, engine)
        self._parent = os.getppid()
        self._step_timeout_s = config.step_timeout_s
        self._closing = closing or threading.Event()
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}".encode()
        self._context = zmq.Context()
        self._send_lock = threading.Lock()
        self._credits = 0
        self._room = threading.Condition()
        self._lost = ""
        self._early: list[FromEngine] = []
        """what came together with the engine's first answer"""
        deadline = time.monotonic() + start_timeout_s
        info = None
        try:
            while info is None:  # an engine that was just ending has to be started anew
                process, self._alive = _start_unless_running(
                    self._folder, config, engine, gpu, server_pid
                )
                self._connect()
                info = self._await_attached(process, deadline, start_timeout_s)
            self.info: EngineInfo = info
            self._process_fd = self._open_process()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._poller.register(self._process_fd, zmq.POLLIN)
        self.started_engine = process is not None
        self.since = time.monotonic()
        if process is not None:
            # Nobody else collects the exit status of this process's child.
            threading.Thread(target=process.wait, name="engine-exit", daemon=True).start()

    @property
    def name(self) -> bytes:
        """How the engine addresses this front end."""
        return self._name

    @property
    def lost(self) -> str:
        """Why the engine can no longer be reached; empty while it can."""
        return self._lost

    def grant(self, credits: int) -> None:
        """The engine has room for so many more sequences."""
        with self._room:
            if not self._lost:
                self._credits += credits
                self._room.notify(credits)

    def take_credit(self, timeout_s: float) -> bool:
        """Leave to send one sequence; false if none came in time, or the engine is lost."""
        with self._room:
            self._room.wait_for(lambda: self._credits or self._lost, timeout_s)
            if not self._credits:
                return False
            self._credits -= 1
            return True

    def send(self, message: bytes) -> None:
        """Send an encoded message, from any thread; to a lost engine there is nothing to say.

        Never blocks: credits bound what is unsent, but for a few bytes twice a second.
        """
        with self._send_lock:
            if not self._lost:
                self._requests.send(message, zmq.NOBLOCK)

    def receive(self) -> list[FromEngine]:
        """Every message that has come; waits at most POLL_S for one, or for the engine's end.

        One thread only.
        """
        messages, self._early = self._early, []
        if not messages and self._outputs in dict(self._poller.poll(int(POLL_S * 1000))):
            while True:
                try:
                    messages.append(decode_from_engine(self._outputs.recv(zmq.NOBLOCK)))
                except zmq.Again:
                    break
        return messages

    def engine_lives(self) -> bool:
        """Whether this link's own engine does, whoever has taken its place."""
        return is_held(self._alive)

    def successor_lives(self) -> bool:
        """Once the engine is lost: whether somebody has started another one."""
        return self._folder.engine_lives()

    def kill_engine(self, reason: str) -> None:
        """End an engine that cannot go on, whatever state it is in.

        RACE: other front ends may do the same. The first leaves the reason for all.
        """
        if not self.engine_lives():
            return
        with contextlib.suppress(ProcessLookupError):
            if not self._folder.failure.exists():
                signal.pidfd_send_signal(self._process_fd, SHOW_STACKS)
                with contextlib.suppress(OSError):  # on a full disk it dies without a reason
                    self._folder.failure.write_text(reason, encoding="utf-8")
            time.sleep(SHOW_STACKS_S)
            signal.pidfd_send_signal(self._process_fd, signal.SIGKILL)

    def last_words(self) -> str:
        """Why the engine died, as far as it could say."""
        try:
            return self._folder.failure.read_text(encoding="utf-8")
        except OSError:
            return "it was killed, or crashed; the server's log may have its last words"

    def lose(self, reason: str) -> None:
        """Give up an engine that has died: its credits mean nothing, and sockets are closed.

        The thread that receives calls this.
        """
        with self._room:
            self._lost, self._credits = reason, 0
            self._room.notify_all()
        with self._send_lock:
            self._disconnect()
        self._context.term()
        self._alive.close()
        os.close(self._process_fd)

    def close(self) -> None:
        """Take leave of the engine. No thread may be in ``receive`` any more.

        One that hangs is ended, since nobody else may be there to notice it.
        """
        if not self._lost:
            self._outputs.send(encode(Detach(self._name)))
            self._await_detached()
            self.lose("the model is being unloaded")
        with starting_lock():
            if not self.successor_lives():  # an engine that ends by itself removes its own folder
                self._folder.remove()

    def _await_detached(self) -> None:
        """Until the engine has heard of the leaving; kill one that says nothing for too long.

        Once the server is gone there is no time left.
        """
        silent_polls = 0
        while self.engine_lives():
            messages = self.receive()
            if any(isinstance(message, Detached) for message in messages):
                return
            silent_polls = 0 if messages else silent_polls + 1
            if silent_polls and os.getppid() != self._parent:
                # At once: Triton's stub ends itself in a moment.
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process_fd, signal.SIGKILL)
            elif silent_polls * POLL_S > self._step_timeout_s:
                log.error("the engine does not hear that its model is unloaded, and is killed")
                self.kill_engine("it hung when its model was unloaded, and was killed")

    def _explain_end(self, process: "subprocess.Popen[bytes] | None") -> None:
        """Raise if the engine ended before it was ready; one that had served takes its folder."""
        if not self._folder.path.exists():
            return
        with contextlib.suppress(FileNotFoundError):
            raise ConfigError(self._folder.failure.read_text(encoding="utf-8"))
        status = "" if process is None else f" with status {process.wait()}"
        raise ConfigError(
            f"the engine ended{status} before it was ready; the server's log has its last words; "
            "status -9 mostly means that the machine ran out of memory"
        )

    def _open_process(self) -> int:
        """The engine's pidfd, which tells of its end without being asked."""
        try:
            opened = os.pidfd_open(self.info.pid)
        except ProcessLookupError:
            raise ConfigError("the engine ended as soon as it was ready") from None
        # RACE: it may have ended, and its number be another process's; not if it lives now.
        if not self.engine_lives():
            os.close(opened)
            raise ConfigError("the engine ended as soon as it was ready")
        return opened

    def _connect(self) -> None:
        self._requests = self._context.socket(zmq.PUSH)
        self._outputs = self._context.socket(zmq.DEALER)
        self._outputs.routing_id = self._name
        self._requests.sndhwm = self._outputs.rcvhwm = 0
        self._requests.linger = self._outputs.linger = 1000
        self._requests.connect(self._folder.requests)
        self._outputs.connect(self._folder.outputs)
        self._poller = zmq.Poller()
        self._poller.register(self._outputs, zmq.POLLIN)
        self._outputs.send(encode(Attach(self._name, os.getpid())))

    def _disconnect(self) -> None:
        if not self.engine_lives():
            self._requests.linger = self._outputs.linger = 0
        self._requests.close()
        self._outputs.close()

    def _await_attached(
        self, process: "subprocess.Popen[bytes] | None", deadline: float, timeout_s: float
    ) -> EngineInfo | None:
        """What the engine says of itself, or None if it ended before it answered."""
        while time.monotonic() < deadline and not self._closing.is_set():
            lives = self.engine_lives()  # asked first: it may answer and then end
            messages = self.receive()
            if messages and isinstance(messages[0], Attached):
                self._early = messages[1:]
                return messages[0].info
            if not lives:
                self._disconnect()
                self._alive.close()
                self._explain_end(process)
                return None
        if process is not None:
            process.kill()
            process.wait()
        else:
            # It would wait for this front end, once it has read of its coming.
            self._outputs.send(encode(Detach(self._name)))
        self._disconnect()
        self._alive.close()
        if self._closing.is_set():
            raise ConfigError("the model is being unloaded")
        raise ConfigError(
            f"the engine was not ready after {timeout_s:.0f} s; "
            "give parameter engine_start_timeout_s a larger value if it needs longer to load"
        )


def _start_unless_running(
    folder: RunFolder, config: EngineConfig, engine: str, gpu: int | None, server_pid: int
) -> "tuple[subprocess.Popen[bytes] | None, IO[bytes]]":
    """The engine's process, None if it ran already, and the file that it holds while it lives."""
    encoded = msgspec.json.encode(config)
    environment = os.environ | visible_gpu(gpu)
    with starting_lock():
        remove_stale()
        if folder.engine_lives():
            running = msgspec.json.decode(folder.config.read_bytes(), type=EngineConfig)
            _check_same(config, running, engine)
            return None, folder.open_alive()
        folder.make()
        folder.config.write_bytes(encoded)
        with folder.hold_alive() as alive:
            log.info("starting engine %s", engine)
            process = subprocess.Popen(
                [
                    _python(),
                    "-m",
                    ENGINE,
                    str(folder.path),
                    str(server_pid),
                    str(alive.fileno()),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[alive.fileno()],
                # Ctrl-C is for the server; the engine ends when its front ends have left.
                start_new_session=True,
            )
        # Not the one above, which shares the engine's own hold and would keep it.
        return process, folder.open_alive()


def visible_gpu(gpu: int | None) -> dict[str, str]:
    """What makes this GPU, of those that the server sees, the only one that the engine does."""
    if gpu is None:
        return {}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is None:
        return {"CUDA_VISIBLE_DEVICES": str(gpu)}
    visible = [device.strip() for device in devices.split(",") if device.strip()]
    if gpu >= len(visible):
        raise ConfigError(
            f"instance_group gpus: {gpu}: no such GPU; CUDA_VISIBLE_DEVICES={devices} shows "
            f"{len(visible)}, numbered from 0"
        )
    return {"CUDA_VISIBLE_DEVICES": visible[gpu]}


def _check_same(wanted: EngineConfig, running: EngineConfig, engine: str) -> None:
    for name in wanted.__struct_fields__:
        if getattr(wanted, name) != getattr(running, name):
            raise ConfigError(
                f"engine {engine} runs with {name}={getattr(running, name)!r}; this model asks "
                f"for {getattr(wanted, name)!r}: unload every model of that engine first"
            )


def _python() -> str:
    """The interpreter whose packages this process uses; inside Triton's stub there is no own."""
    python = shutil.which("python3") or sys.executable
    if not python:
        raise ConfigError("no python3 on PATH to run the engine with")
    return python
