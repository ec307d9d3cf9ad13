"""Starts the engine if this front end is the first to need it, and talks to it."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid

import msgspec
import zmq

from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.messages import (
    Attach,
    Attached,
    Detach,
    EngineInfo,
    FromEngine,
    decode_from_engine,
    encode,
)
from fi_runtime.run_folder import RunFolder, remove_stale, starting_lock

log = logging.getLogger(__name__)

POLL_MS = 200
ENGINE = "fi_runtime.engine.server"
"""the module that is run as the engine; a measurement of all the rest puts another one here"""


class EngineLink:
    """This process's channel to an engine: the one on the CPU, or on the GPU of that number.

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
    ) -> None:
        engine += "" if gpu is None else f"-gpu{gpu}"
        self._folder = RunFolder.of(server_pid, engine)
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}".encode()
        self._context = zmq.Context()
        self._send_lock = threading.Lock()
        self._early: list[FromEngine] = []
        """what came together with the engine's first answer"""
        deadline = time.monotonic() + start_timeout_s
        info = None
        while info is None:  # an engine that was just ending has to be started anew
            process = _start_unless_running(self._folder, config, engine, gpu, server_pid)
            self._connect()
            info = self._await_attached(process, deadline, start_timeout_s)
        self.info: EngineInfo = info
        if process is not None:
            # Nobody else collects the exit status of this process's child.
            threading.Thread(target=process.wait, name="engine-exit", daemon=True).start()

    @property
    def name(self) -> bytes:
        """How the engine addresses this front end."""
        return self._name

    def send(self, message: bytes) -> None:
        """Send an encoded message, from any thread. Never blocks: credits bound what is unsent."""
        with self._send_lock:
            self._requests.send(message, zmq.NOBLOCK)

    def receive(self) -> list[FromEngine]:
        """Every message that has come, waiting at most POLL_MS for the first. One thread only."""
        messages, self._early = self._early, []
        if not messages and self._outputs.poll(POLL_MS):
            while True:
                try:
                    messages.append(decode_from_engine(self._outputs.recv(zmq.NOBLOCK)))
                except zmq.Again:
                    break
        return messages

    def engine_lives(self) -> bool:
        return self._folder.engine_lives()

    def close(self) -> None:
        """Take leave of the engine. No thread may be in ``receive`` or ``send`` any more."""
        self._outputs.send(encode(Detach(self._name)))
        self._disconnect()
        self._context.term()
        with starting_lock():
            if not self.engine_lives():  # an engine that ends by itself removes its own folder
                self._folder.remove()

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

    def _connect(self) -> None:
        self._requests = self._context.socket(zmq.PUSH)
        self._outputs = self._context.socket(zmq.DEALER)
        self._outputs.routing_id = self._name
        self._requests.sndhwm = self._outputs.rcvhwm = 0
        self._requests.linger = self._outputs.linger = 1000
        self._requests.connect(self._folder.requests)
        self._outputs.connect(self._folder.outputs)
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
        while time.monotonic() < deadline:
            lives = self.engine_lives()  # asked first: it may answer and then end
            messages = self.receive()
            if messages and isinstance(messages[0], Attached):
                self._early = messages[1:]
                return messages[0].info
            if not lives:
                self._disconnect()
                self._explain_end(process)
                return None
        self._disconnect()
        if process is not None:
            process.kill()
            process.wait()
        raise ConfigError(
            f"the engine was not ready after {timeout_s:.0f} s; "
            "give parameter engine_start_timeout_s a larger value if it needs longer to load"
        )


def _start_unless_running(
    folder: RunFolder, config: EngineConfig, engine: str, gpu: int | None, server_pid: int
) -> "subprocess.Popen[bytes] | None":
    """The engine's process if this call started it, None if it runs already."""
    encoded = msgspec.json.encode(config)
    environment = os.environ | visible_gpu(gpu)
    with starting_lock():
        remove_stale()
        if folder.engine_lives():
            running = msgspec.json.decode(folder.config.read_bytes(), type=EngineConfig)
            _check_same(config, running, engine)
            return None
        folder.make()
        folder.config.write_bytes(encoded)
        with folder.hold_alive() as alive:
            log.info("starting engine %s", engine)
            return subprocess.Popen(
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
