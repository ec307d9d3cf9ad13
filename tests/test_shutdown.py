"""A server, or a model, that is ending: what is in flight ends in time, and nothing is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from fi_runtime import shared_memory
from fi_runtime.run_folder import private_base
from tests.serving import (
    HANG_S,
    KNOBS,
    STREAMED,
    UNARY,
    Reference,
    Response,
    Stream,
    error_of,
    grpc_client,
    infer_grpc,
    infer_http,
    joined,
    stream,
    wait_until,
)
from tools.repository import write_repository
from tools.serve import ROOT, TritonServer

EXIT_S = 5
OVERTIME_S = 3.0
"""for a server that does not end by itself"""
LONG = {"max_tokens": 3500, "temperature": 0.0}
SHORT = {"text_input": "short", "max_tokens": 100, "temperature": 0.0}


@contextlib.contextmanager
def serving(checkpoint: Path, folder: Path) -> Iterator[TritonServer]:
    repository = write_repository(folder / "repository", checkpoint, KNOBS, instances=1)
    arguments = [
        f"--exit-timeout-secs={EXIT_S}",
        "--model-control-mode=explicit",
        "--load-model=*",
    ]
    with TritonServer(repository, arguments, log=folder / "log") as server:
        server.wait_ready()
        assert infer_grpc(server, **SHORT).text, "its front ends have seen it serve"
        time.sleep(0.5)
        yield server


def has_ended(server: TritonServer) -> bool:
    assert server.process is not None
    return server.process.poll() is not None and not server.started()


def leftovers(mark: str, pid: int) -> list[Path]:
    return [*shared_memory.FOLDER.glob(f"{mark}*"), *private_base().glob(f"{pid}-*")]


class Busy:
    """More long answers than are done within any exit timeout, and a short one beside them."""

    def __init__(
        self, server: TritonServer, pool: ThreadPoolExecutor, *whole: Callable[..., Response]
    ) -> None:
        """``whole``: calls for one answer each, to be made beside the streams."""
        self.server = server
        self._opened = [
            Stream(server, text_input=f"long {i}", stream=True, **LONG) for i in range(16)
        ]
        for one in self._opened:
            one.next()
        self._short = Stream(server, stream=True, **SHORT)
        self._read = [self._short.next().text]
        self._whole: list[Future[tuple[str, str]]] = [
            pool.submit(error_of, call, server, text_input="whole", **LONG) for call in whole
        ]
        time.sleep(0.3)

    def assert_ended_in(self, seconds: float, reference: Reference) -> None:
        """That the short one was answered, the others refused, and all of it in time."""
        begin = time.monotonic()
        text = "".join(self._read) + joined(list(self._short))
        assert text == reference.text("short", 100)
        self._short.close()
        for one in self._opened:
            with pytest.raises(InferenceServerException, match="is ending"):
                list(one)
            one.close()
        ends = [call.result(HANG_S) for call in self._whole]
        assert all(code in ("StatusCode.UNAVAILABLE", "503") for code, _ in ends)
        assert all("is ending" in message for _, message in ends)
        assert time.monotonic() - begin < seconds


def test_sigterm_ends_what_is_in_flight_within_the_exit_timeout(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    reference.text("short", 100)
    with serving(served_checkpoint, tmp_path) as server, ThreadPoolExecutor(2) as pool:
        # While an HTTP connection is open, tritonserver 2.51 goes on serving over gRPC.
        busy = Busy(server, pool, infer_grpc)
        os.kill(server.pid, signal.SIGTERM)
        signalled = time.monotonic()
        time.sleep(0.3)
        _, refusal = error_of(infer_grpc, server, text_input="late")
        assert "no available versions" in refusal, "nothing new is admitted"
        busy.assert_ended_in(EXIT_S, reference)
        left_s = EXIT_S + OVERTIME_S - (time.monotonic() - signalled)
        wait_until(lambda: has_ended(server), left_s, "every process has ended")
        assert server.wait() == 0
        assert leftovers(server.mark, server.pid) == []


def test_unloading_ends_what_is_in_flight_and_a_client_that_stays_cannot_keep_a_server(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    reference.text("short", 100)
    with serving(served_checkpoint, tmp_path) as server, ThreadPoolExecutor(2) as pool:
        busy = Busy(server, pool, infer_grpc, infer_http)
        with contextlib.closing(grpc_client(server)) as client:
            for door in (STREAMED, UNARY):
                client.unload_model(door)
            busy.assert_ended_in(EXIT_S, reference)
            wait_until(
                lambda: {m.state for m in server.models() or []} == {"UNAVAILABLE"},
                EXIT_S,
                "both doors are unloaded",
            )
            wait_until(lambda: server.started() == [server.pid], 2, "all else has ended")
            assert list(private_base().glob(f"{server.pid}-*")) == []
            for door in (STREAMED, UNARY):
                client.load_model(door)
        assert joined(stream(server, **SHORT)) == reference.text("short", 100)
        time.sleep(0.5)  # its front ends have seen it serve
        # tritonserver 2.51 waits for ever for a client that has a stream open, idle as it is.
        with Stream(server, stream=True, **SHORT) as idle:
            list(idle)
            os.kill(server.pid, signal.SIGTERM)
            wait_until(lambda: has_ended(server), EXIT_S + OVERTIME_S, "every process has ended")
        assert leftovers(server.mark, server.pid) == []


def test_a_second_signal_ends_the_serve_command_at_once(tmp_path: Path) -> None:
    addresses = TritonServer()  # never started: for its free ports
    arguments = [f"--{name}={value}" for name, value in addresses.options.items()]
    command = [sys.executable, "-m", "tools.serve", *arguments, "--exit-timeout-secs=60"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as served,
    ):
        try:
            wait_until(
                lambda: {m.state for m in addresses.models() or []} == {"READY"}, 60, "ready"
            )
            family = psutil.Process(served.pid).children(recursive=True)
            [triton] = [p for p in family if p.name() == "tritonserver"]
            mark = triton.environ()["FI_RUNTIME_SERVER"]
            story = {"text_input": "Once upon a time", "max_tokens": 1900, "end_id": -1}
            with Stream(addresses, stream=True, **story) as opened:
                opened.next()
                served.send_signal(signal.SIGTERM)
                time.sleep(1.0)
                assert served.poll() is None, "it waits for the answer"
                served.send_signal(signal.SIGTERM)
                wait_until(lambda: served.poll() is not None, 2, "the command has ended")
            wait_until(
                lambda: not any(p.is_running() and p.status() != "zombie" for p in family),
                2,
                "every process has ended",
            )
        finally:
            served.kill()
    assert leftovers(mark, triton.pid) == []
