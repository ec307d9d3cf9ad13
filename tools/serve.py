"""Run tritonserver with this project's models, in the foreground; start and stop it for tests.

python -m tools.serve [any option of tritonserver]
"""

import contextlib
import ctypes
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from fi_runtime import shared_memory
from fi_runtime.run_folder import private_base

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
DEFAULT_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}  # tritonserver's own
EXIT_TIMEOUT_SECONDS = 5  # for an orderly end
OVERTIME_SECONDS = 3.0  # after which what is left is killed, within 10 s of Ctrl-C
POLL_SECONDS = 0.1
CALL_THREADS = 8
RESTRICTED = "shared-memory,trace,logging"
"""Triton's APIs that are closed, since with them a client names memory and files of this machine"""
RULE = "=" * 78
# What the default checkpoint can answer.
EXAMPLE = {"text_input": "17+25=", "max_tokens": 8, "temperature": 0.0}


class ServerError(Exception):
    """The server did not start, or not all that was asked of it; the message says why."""


@dataclass(frozen=True)
class Model:
    """One model version as the server lists it."""

    name: str
    version: str
    state: str  # READY, LOADING, UNLOADING, UNAVAILABLE, or "" where it was never asked for
    reason: str


class TritonServer:
    """A tritonserver process of ours, with all that it starts.

        with TritonServer(log=tmp_path / "log") as server:
            server.wait_ready()
            client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

    Listens on loopback, on free ports unless `arguments` name some. Ends with the thread that
    started it, should that die. `arguments` are any options of tritonserver, and come last.
    """

    def __init__(
        self,
        repository: Path | str = ROOT / "model_repository",
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        ports: Mapping[str, int] | None = None,
    ) -> None:
        """Nothing starts yet.

        `env` is added to this process's environment, `log` takes the output (default: this
        process's own), `ports` are defaults for "http", "grpc" and "metrics".
        """
        self.arguments = list(arguments)
        self.log = log
        self.mark = f"fi_runtime_{os.getpid()}_{secrets.token_hex(4)}_"
        self.process: subprocess.Popen[bytes] | None = None
        self._env = {**os.environ, **(env or {}), "FI_RUNTIME_SERVER": self.mark}
        ports = ports or dict(zip(DEFAULT_PORTS, free_ports(len(DEFAULT_PORTS)), strict=True))
        defaults = {"exit-on-error": "false", "exit-timeout-secs": str(EXIT_TIMEOUT_SECONDS)}
        for name, port in ports.items():
            defaults |= {f"{name}-address": LOOPBACK, f"{name}-port": str(port)}
        defaults["model-repository"] = str(repository)
        self.options = {name: option(self.arguments, name) or defaults[name] for name in defaults}

    def address(self, service: str) -> tuple[str, int]:
        """Host and port to reach a service at: "http", "grpc" or "metrics"."""
        host = self.options[f"{service}-address"]
        return host.replace("0.0.0.0", LOOPBACK), int(self.options[f"{service}-port"])

    @property
    def http_address(self) -> str:
        """host:port, as tritonclient.http wants it."""
        return "{}:{}".format(*self.address("http"))

    @property
    def http_url(self) -> str:
        """http://host:port, for everyone else."""
        return f"http://{self.http_address}"

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient.grpc wants it."""
        return "{}:{}".format(*self.address("grpc"))

    @property
    def metrics_url(self) -> str:
        """The page that Prometheus reads."""
        return "http://{}:{}/metrics".format(*self.address("metrics"))

    @property
    def pid(self) -> int:
        """The process id of tritonserver itself."""
        if self.process is None:
            raise ServerError("the server was not started")
        return self.process.pid

    def start(self) -> None:
        """Start the process; `wait_ready` waits for its models."""
        given = [f"--{n}={v}" for n, v in self.options.items() if option(self.arguments, n) is None]
        # So that what a killed process leaves in /dev/shm has a name of ours.
        given.append(f"--backend-config=python,shm-region-prefix-name={self.mark}")
        # Of each front end, in the server: more than it has calls at a time. Those of one that has
        # died are never ended by tritonserver 2.51, whose default is 32.
        given.append(f"--backend-config=python,thread-pool-size={CALL_THREADS}")
        key = secrets.token_hex(16)  # known to no client
        given += [
            f"--{name}={RESTRICTED}:admin={key}"
            for name in ("http-restricted-api", "grpc-restricted-protocol")
            if option(self.arguments, name) is None
        ]
        # Their config.pbtxt is complete: to ask each model for more takes a process and a second.
        given.append("--disable-auto-complete-config")
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self.log.open("ab")) if self.log else None
            self.process = subprocess.Popen(
                [find_program("tritonserver"), *given, *self.arguments],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,  # a terminal's Ctrl-C reaches only us, and we stop it
                preexec_fn=end_with_parent,
            )

    def models(self) -> list[Model] | None:
        """What the server lists, with reasons; None while it does not answer yet."""
        request = urllib.request.Request(f"{self.http_url}/v2/repository/index", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                listed = json.load(response)
        except urllib.error.HTTPError as error:  # it answers only once it has tried to load all
            reason = error.read().decode(errors="replace")
            raise ServerError(f"tritonserver could not start: {reason}{self.log_tail()}") from None
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None
        keys = ("name", "version", "state", "reason")
        return [Model(*(model.get(key, "") for key in keys)) for model in listed]

    def wait_loaded(self, timeout: float = float("inf")) -> list[Model]:
        """Wait until the server answers and no model is being loaded; some may have failed."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            code = self.process.poll() if self.process else 0
            if code is not None:
                raise ServerError(f"tritonserver ended with code {code}{self.log_tail()}")
            models = self.models()
            if models is not None and not any(model.state == "LOADING" for model in models):
                return models
            time.sleep(POLL_SECONDS)
        raise ServerError(f"the models were not loaded in {timeout:.0f} s{self.log_tail()}")

    def wait_ready(self, models: Iterable[str] | None = None, timeout: float = 120) -> None:
        """Wait until these models, or all there are, are ready; raise with Triton's reasons."""
        end = time.monotonic() + timeout
        listed = self.wait_loaded(timeout)
        while not _listens(*self.address("metrics")):  # the server opens this port last
            if time.monotonic() > end:
                raise ServerError(f"no metrics after {timeout:.0f} s{self.log_tail()}")
            time.sleep(POLL_SECONDS)
        wanted = set(models) if models is not None else {model.name for model in listed}
        failed = wanted - {model.name for model in listed if model.state == "READY"}
        if failed:
            reasons = {m.name: m.reason for m in listed}
            details = "; ".join(f"{n}: {reasons.get(n, 'not there')}" for n in sorted(failed))
            raise ServerError(f"not ready: {details}{self.log_tail()}")

    def wait(self) -> int:
        """Wait until the server ends; its exit code."""
        return self.process.wait() if self.process else 0

    def stop(self) -> int:
        """End the server and all that it started; leave nothing behind. Its exit code."""
        exit_timeout_s = float(self.options["exit-timeout-secs"])
        end = time.monotonic() + exit_timeout_s + OVERTIME_SECONDS
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        while self.started():
            if time.monotonic() > end:
                self.kill()
            time.sleep(POLL_SECONDS)
        code = self.wait()
        self._remove_leftovers()
        return code

    def kill(self) -> None:
        """Kill the server and all that it started, now."""
        for pid in self.started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def started(self) -> list[int]:
        """Process ids of the server and all that it started, in whatever session they are.

        Known by a variable in their environment, which they all inherit.
        """
        mark = f"FI_RUNTIME_SERVER={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _remove_leftovers(self) -> None:
        for file in shared_memory.FOLDER.glob(f"{self.mark}*"):
            file.unlink(missing_ok=True)
        if self.process is not None:
            # Where front ends and engine of this server meet: sockets, pid files.
            for folder in private_base().glob(f"{self.pid}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def log_tail(self, count: int = 20) -> str:
        """The last lines of its log, in words to follow others; empty if there is none."""
        if self.log is None or not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-count:]
        return "\n".join([f"; the end of {self.log}:", *lines])


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option of tritonserver in its arguments: --name=value or --name value."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        key, equals, given = argument.partition("=")
        if key == f"--{name}":
            value = given if equals else following
    return value


def find_program(name: str) -> str:
    """A program that the set-up made, or else one on PATH."""
    ours = ROOT / ".venv" / "bin" / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"no {name} in {ours.parent} or on PATH; run: make setup")
    return found


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def end_with_parent() -> None:
    """In a child: ask Linux for SIGTERM when the parent dies, however it dies."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


# The command


def main(arguments: Sequence[str]) -> int:
    """Check, start, say when it is ready, wait; the server's exit code, 0 after Ctrl-C."""
    server = TritonServer(arguments=arguments, ports=DEFAULT_PORTS)
    problems = list(find_problems(server))
    for problem in problems:
        say(problem)
    if problems:
        return 1
    stop_on_signals(server)
    try:
        server.start()
        models = server.wait_loaded()
        print(describe(server, models), flush=True)
        if not any(model.state == "READY" for model in models):
            say("no model could be loaded; the reasons are above")
            return 1
        code = server.wait()
        say(f"tritonserver ended by itself with code {code}")
        return code if code >= 0 else 128 - code  # killed: as a shell says it
    except KeyboardInterrupt:
        say("stopping")
        return 0
    except ServerError as error:
        say(str(error))
        return 1
    finally:
        server.stop()


def stop_on_signals(server: TritonServer) -> None:
    """The first Ctrl-C, SIGTERM or SIGHUP is a KeyboardInterrupt; the next kills the server."""
    came = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came == 1:
            raise KeyboardInterrupt
        server.kill()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)


def find_problems(server: TritonServer) -> Iterator[str]:
    """What keeps this server from starting, one message each."""
    for service in DEFAULT_PORTS:
        if option(server.arguments, f"allow-{service}") in ("false", "0"):
            continue
        host, port = server.options[f"{service}-address"], server.options[f"{service}-port"]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except (OSError, ValueError, OverflowError) as error:
                why = getattr(error, "strerror", None) or "no port number"
                yield (
                    f"cannot listen on {host}:{port} for {service}: {why}. Stop what listens "
                    f"there, or choose another port: make serve ARGS=--{service}-port=NUMBER"
                )
    repository = server.options.get("model-repository", "")
    if "://" not in repository and not Path(repository).is_dir():
        yield (
            f"no model repository {repository}: no such folder. Name one that exists: "
            "make serve ARGS=--model-repository=FOLDER"
        )
    if (shortage := shared_memory.shortage()) is not None:
        yield shortage


def describe(server: TritonServer, models: Sequence[Model]) -> str:
    """The block that says what is there and how to use it."""
    ready = [model.name for model in models if model.state == "READY"]
    doors = [f"{m.name}: {m.state} {first_line(m.reason)}".rstrip() for m in models] or ["none"]
    rows = [
        ("HTTP", [server.http_url]),
        ("gRPC", [server.grpc_url]),
        ("metrics", [server.metrics_url]),
        ("doors", doors),
    ]
    if ready:
        door = "llm" if "llm" in ready else ready[0]
        url = f"{server.http_url}/v2/models/{door}/generate"
        rows.append(("try", [f"curl -s {url} -d '{json.dumps(EXAMPLE)}'"]))
    rows.append(("stop", ["Ctrl-C"]))
    lines = [
        f"  {'' if i else label:9}{text}" for label, texts in rows for i, text in enumerate(texts)
    ]
    title = "ready" if len(ready) == len(models) > 0 else "not every door is ready"
    return "\n".join(["", RULE, f"  {title}", "", *lines, RULE, ""])


def first_line(text: str) -> str:
    """The first line of a reason; the traceback under it is in the log."""
    return text.strip().partition("\n")[0]


def say(message: str) -> None:
    """One line about what happens, apart from tritonserver's log."""
    print(f"serve: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
